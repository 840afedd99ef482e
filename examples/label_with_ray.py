"""`efficientsam label` with Ray Data dealing out the shards, for clusters that run Ray anyway.

python examples/label_with_ray.py "sa_*.tar" LABELS --format parquet --actors 8 --gpus 1
"""

import argparse

import ray

from efficientsam_hf import load_checkpoint, segment_everything
from efficientsam_hf.evaluation.predictor import EfficientSamPredictor
from efficientsam_hf.labelling.shards import LabelFolder
from efficientsam_hf.labelling.sources import find_label_shards


class Labeller:
    """One actor: a model in memory, and shards by their numbers."""

    def __init__(self, source: str, output: str, format: str, model: str | None, settings: dict):
        self.model, self.processor = load_checkpoint(model)
        self.folder = LabelFolder(output, format, find_label_shards(source), settings)

    def __call__(self, batch: dict) -> dict:
        # As the only one of its kind in a world of as many processes as there are shards.
        done = [list(self.folder.label(self.find, int(n), len(self.folder.shards))) for n in batch["shard"]]
        return {"shard": batch["shard"], "new": [len(names) for names in done]}

    def find(self, name, pixels):
        return segment_everything(self.model, self.processor, pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("--format", default="coco")
    parser.add_argument("--model", help="folder or Hub id; the bundled checkpoint if left out")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    args = parser.parse_args()
    shards = find_label_shards(args.source)
    # Labels of other weights are refused, also where these have the same name.
    weights = EfficientSamPredictor(*load_checkpoint(args.model, device="cpu")).weights_hash()
    settings = {"model": args.model or "default", "weights_sha256": weights}
    folder = LabelFolder(args.output, args.format, shards, settings)
    given = {name: getattr(args, name) for name in ("source", "output", "format", "model")} | {"settings": settings}
    rows = ray.data.from_items([{"shard": number} for number in range(len(shards))])
    # A failed shard stays without a note; the command, started again, does it.
    rows.map_batches(
        Labeller,
        batch_size=1,
        fn_constructor_kwargs=given,
        num_cpus=1,
        num_gpus=args.gpus,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
    ).materialize()
    report, missing = folder.report()
    if missing:
        raise SystemExit(f"{len(missing)} of {len(shards)} shards are missing, as {missing[0]}: start again")
    files = folder.conclude()
    print(f"{report.pictures} pictures, {report.masks} masks, {len(report.skipped)} skipped: {files or args.output}")


if __name__ == "__main__":
    main()
