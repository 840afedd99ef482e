"""A teacher's features on disk, so that it looks at each picture once and not once an epoch.

A cache is a folder: `index.json` says whose features these are and of what, `features_N.safetensors` holds those of a
run of pictures in float16, `features_N.json` beside it the checksum. A shard without that file does not count, so that
what a kill left is done again; processes take shards in turn.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.crops import Crop, SampleMaker, cut
from ..data.images import CorruptPictureError, Picture
from ..written_files import written_together
from .teachers import Teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSettings:
    """What is kept of a picture.

    Args:
        grid: Side of the kept features in cells.
        crops: 0 keeps the whole picture's features, stretched to the teacher's square, from which training cuts the
            crops that it cuts out of the pixels. Otherwise those of so many random crops, exact, and then repeated.
        seed: Of those crops.
        smallest_area: Of those crops.
        pictures_per_shard: Pictures in a file.
    """

    grid: int = 64
    crops: int = 0
    seed: int = 0
    smallest_area: float = 0.2
    pictures_per_shard: int = 1000


def pictures_digest(pictures: Sequence[Picture]) -> str:
    """A fingerprint of which pictures there are, of how many bytes, and in which order."""
    lines = (f"{'/'.join(Path(picture.name).parts[-2:])} {picture.blob.count()}" for picture in pictures)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def write_cache(
    folder: str | Path,
    pictures: Sequence[Picture],
    teacher: Teacher,
    maker: SampleMaker,
    settings: CacheSettings,
    batch_size: int = 8,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[int]:
    """Write this process's part of the shards that are not there yet; gives the number of each when it is.

    Args:
        folder: The cache.
        pictures: All of them, the same in every process.
        teacher: Where its weights are, it works.
        maker: Cuts the crops, if `settings.crops`.
        settings: What is kept.
        batch_size: Pictures or crops that the teacher sees at once.
        rank: Number of this process.
        processes: How many there are.

    Raises:
        ValueError: if the folder is the cache of another teacher, other pictures or other settings.
    """
    folder = Path(folder)
    wanted: dict[str, Any] = {"teacher": teacher.identity(), "settings": vars(settings)}
    wanted |= {"count": len(pictures), "pictures": pictures_digest(pictures)}
    write_index(folder, wanted)
    for shard in range(rank, -(-len(pictures) // settings.pictures_per_shard), processes):
        if shard_is_whole(folder, shard):
            continue
        first = shard * settings.pictures_per_shard
        numbers = range(first, min(first + settings.pictures_per_shard, len(pictures)))
        tensors = dict(look(pictures, numbers, teacher, maker, settings, batch_size))
        file, note = shard_files(folder, shard)
        with written_together([file, note]) as (file_part, note_part):
            save_file(tensors, file_part)
            note_part.write_text(json.dumps({"sha256": file_digest(file_part), "features": len(tensors)}))
        yield shard


def look(
    pictures: Sequence[Picture],
    numbers: Iterable[int],
    teacher: Teacher,
    maker: SampleMaker,
    settings: CacheSettings,
    batch_size: int,
) -> Iterator[tuple[str, Tensor]]:
    """Names and features (C, grid, grid) float16 of these pictures; a corrupt one has none."""
    waiting: list[tuple[str, Tensor]] = []
    for number in numbers:
        try:
            image = pictures[number].read()
        except CorruptPictureError as error:
            logger.warning("skipped: %s", error)
            continue
        whole = Crop(0, 0, *image.size, False)
        crops = [maker.draw_crop(image, number, epoch) for epoch in range(settings.crops)] or [whole]
        waiting += [(f"{number}.{place}", cut(image, crop, teacher.image_size)) for place, crop in enumerate(crops)]
        while len(waiting) >= batch_size:
            yield from answers(teacher, waiting[:batch_size], settings.grid)
            waiting = waiting[batch_size:]
    if waiting:
        yield from answers(teacher, waiting, settings.grid)


def answers(teacher: Teacher, batch: list[tuple[str, Tensor]], grid: int) -> Iterator[tuple[str, Tensor]]:
    """Names and squares -> names and features."""
    names, squares = zip(*batch, strict=True)
    pixels = torch.stack(squares).to(teacher.mean.device).float() / 255
    features = teacher(pixels, grid).half().cpu()
    # Each in memory of its own, as safetensors wants them.
    return zip(names, (part.clone(memory_format=torch.contiguous_format) for part in features), strict=True)


def shard_files(folder: Path, shard: int) -> tuple[Path, Path]:
    """A shard and the note with its checksum."""
    return folder / f"features_{shard:05}.safetensors", folder / f"features_{shard:05}.json"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def shard_is_whole(folder: Path, shard: int) -> bool:
    """Whether a shard is there with the checksum that was noted for it."""
    file, note = shard_files(folder, shard)
    return file.is_file() and note.is_file() and json.loads(note.read_text())["sha256"] == file_digest(file)


def write_index(folder: Path, wanted: dict[str, Any]) -> None:
    """Note what the cache holds, or check that the one there holds the same."""
    index = folder / "index.json"
    if not index.is_file():
        # Processes that begin together all write it, each a file of its own.
        own = folder / f".index.{os.getpid()}.part.json"
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(wanted, indent=1) + "\n")
        own.replace(index)
    check_index(folder, wanted)


def read_index(folder: str | Path) -> dict[str, Any]:
    """What a cache holds: `teacher`, `settings`, `count`, `pictures`.

    Raises:
        FileNotFoundError: if there is no cache.
    """
    index = Path(folder) / "index.json"
    if not index.is_file():
        raise FileNotFoundError(f"no feature cache in {folder}: `efficientsam cache-features` makes one")
    return json.loads(index.read_text())


def cutting_as_cached(maker: SampleMaker, folder: str | Path) -> SampleMaker:
    """A maker that cuts the crops whose features a cache holds; the same maker for a cache of whole pictures."""
    settings = CacheSettings(**read_index(folder)["settings"])
    if not settings.crops:
        return maker
    crop = replace(maker.crop, smallest_area=settings.smallest_area)
    return replace(maker, crop=crop, crops=settings.crops, crop_seed=settings.seed)


def check_index(folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse a cache that differs from what is wanted.

    Raises:
        ValueError: naming both.
    """
    found = read_index(folder)
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(f"the cache in {folder} has {key} {found[key]}, wanted {value}")


class FeatureCache:
    """Features of crops, read from a cache: an object to be called as `UnlabelledImages` wants.

    Args:
        folder: The cache.
        pictures: What it must be of.
        grid: Side of the student's grid.
        maker: The crops that training cuts; a cache of crops must have been made of the same: `cutting_as_cached`.
        teacher: What it must have been made by; anyone if None.

    Raises:
        FileNotFoundError: if there is no cache, or not all of it.
        ValueError: if it is one of something else.
    """

    def __init__(
        self,
        folder: str | Path,
        pictures: Sequence[Picture],
        grid: int,
        maker: SampleMaker,
        teacher: dict[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        self.pictures = pictures
        self.grid = grid
        self.settings = CacheSettings(**read_index(folder)["settings"])
        wanted: dict[str, Any] = {} if teacher is None else {"teacher": teacher}
        check_index(self.folder, {**wanted, "count": len(pictures), "pictures": pictures_digest(pictures)})
        if self.settings.crops:
            seed = maker.seed if maker.crop_seed is None else maker.crop_seed
            own = {"grid": grid, "crops": maker.crops, "seed": seed, "smallest_area": maker.crop.smallest_area}
            kept = {name: getattr(self.settings, name) for name in own}
            if kept != own:
                raise ValueError(f"the cache in {folder} holds the crops {kept}, wanted {own}")
        shards = range(-(-len(pictures) // self.settings.pictures_per_shard))
        missing = [shard for shard in shards if not all(path.is_file() for path in shard_files(self.folder, shard))]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of {len(shards)} shards of {folder} are missing, as {missing[0]}")
        self.open_shards: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not go into the processes of a loader; each opens its own.
        return {**self.__dict__, "open_shards": {}}

    def __call__(self, number: int, size: tuple[int, int], crop: Crop, epoch: int) -> Tensor:
        """Features (C, grid, grid) of a crop of picture `number`, whose size is (width, height).

        Raises:
            CorruptPictureError: if the picture could not be read when the cache was made.
        """
        if self.settings.crops:
            return self.read(number, epoch % self.settings.crops).float()
        return crop_features(self.read(number, 0).float(), size, crop, self.grid)

    def read(self, number: int, place: int) -> Tensor:
        """What was kept, (C, grid, grid) float16."""
        shard = number // self.settings.pictures_per_shard
        if shard not in self.open_shards:
            self.open_shards[shard] = safe_open(shard_files(self.folder, shard)[0], framework="pt")
        try:
            return self.open_shards[shard].get_tensor(f"{number}.{place}")
        except SafetensorError as error:
            name = self.pictures[number].name
            raise CorruptPictureError(f"{name} has no features in {self.folder}, where it was unreadable") from error


def crop_features(features: Tensor, size: tuple[int, int], crop: Crop, grid: int) -> Tensor:
    """The part of a whole picture's features (C, h, w) under a crop, resized -> (C, grid, grid).

    Antialiased where the crop has more cells than the grid, so that each value is the mean over what it stands for.
    """
    # How finely the crop's edges are met: cells are cut in parts, which are then averaged.
    fine = grid * max(1, -(-max(features.shape[-2:]) // grid))
    steps = (torch.arange(fine) + 0.5) / fine
    x = (crop.left + (1 - steps if crop.flip else steps) * crop.width) / size[0]
    y = (crop.top + steps * crop.height) / size[1]
    places = torch.stack(torch.meshgrid(2 * x - 1, 2 * y - 1, indexing="xy"), dim=-1)[None]
    sampled = F.grid_sample(features[None], places, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, fine // grid)[0]


def cached_channels(folder: str | Path) -> int:
    """How many channels the features of a cache have.

    Raises:
        FileNotFoundError: if there is no shard with features.
    """
    for path in sorted(Path(folder).glob("features_*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - it is no dictionary; of corrupt pictures alone it has none
                return shard.get_slice(name).get_shape()[0]
    raise FileNotFoundError(f"no feature cache in {folder}: `efficientsam cache-features` makes one")
