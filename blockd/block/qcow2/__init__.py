"""The qcow2 image format, by QEMU's ``docs/interop/qcow2.txt`` ("the specification" here)."""
