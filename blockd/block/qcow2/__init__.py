"""The qcow2 image format, by QEMU's ``docs/interop/qcow2.txt`` ("the specification" here)."""

from blockd.block.qcow2.bitmap_directory import BitmapEntry, BitmapFlag
from blockd.block.qcow2.chain import BackingImage, backing_path, find_backing, name_backing
from blockd.block.qcow2.create import create_image
from blockd.block.qcow2.driver import Qcow2Driver
from blockd.block.qcow2.features import CompressionType
from blockd.block.qcow2.header import Header
from blockd.block.qcow2.image import Image, open_image, read_header
from blockd.block.qcow2.image_options import ImageOptions, Preallocation
from blockd.block.qcow2.layout import plan_image
from blockd.block.qcow2.new_image import NewImage

__all__ = [
    "BackingImage",
    "BitmapEntry",
    "BitmapFlag",
    "CompressionType",
    "Header",
    "Image",
    "ImageOptions",
    "NewImage",
    "Preallocation",
    "Qcow2Driver",
    "backing_path",
    "create_image",
    "find_backing",
    "name_backing",
    "open_image",
    "plan_image",
    "read_header",
]
