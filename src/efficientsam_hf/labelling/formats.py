"""The files that labels come in. Each format writes one shard at a time; what it writes is whole or not there.

coco      parts/SHARD.jsonl, and at the end coco.json    run lengths
sa1b      SHARD.tar of pictures and JSON                 run lengths
labelme   NAME.json                                      polygons
yolo      labels/NAME.txt, and at the end data.yaml      polygons
png       masks/NAME.png                                 label maps of 16 bits
parquet   SHARD.parquet                                  run lengths, a row a picture
"""

from .picture_files import Labelme, Png, Yolo
from .shard_files import Coco, Parquet, Sa1b
from .writing import Format

FORMATS: dict[str, type[Format]] = {
    "coco": Coco,
    "sa1b": Sa1b,
    "labelme": Labelme,
    "yolo": Yolo,
    "png": Png,
    "parquet": Parquet,
}
