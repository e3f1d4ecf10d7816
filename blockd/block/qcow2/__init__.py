"""The qcow2 image format, by QEMU's ``docs/interop/qcow2.txt`` ("the specification" here)."""

from blockd.block.qcow2.create import create_image
from blockd.block.qcow2.features import CompressionType
from blockd.block.qcow2.image_options import ImageOptions, Preallocation

__all__ = ["CompressionType", "ImageOptions", "Preallocation", "create_image"]
