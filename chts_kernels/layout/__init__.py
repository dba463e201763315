"""Where packed operands put their bits: logical order to hardware order and back, both in one file per layout."""

from .metadata import ids_from_metadata, metadata_from_ids, metadata_shape

__all__ = ["ids_from_metadata", "metadata_from_ids", "metadata_shape"]
