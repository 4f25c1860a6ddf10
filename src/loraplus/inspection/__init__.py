"""What an adapter, checkpoint, output or model folder holds, read without loading a model."""

from loraplus.inspection.folder import inspect_folder

__all__ = ["inspect_folder"]
