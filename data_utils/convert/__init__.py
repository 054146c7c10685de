"""Episodes from one format to another: `python -m data_utils.convert --help`."""

from .hdf5_files import compress_hdf5, truncate_hdf5, write_hdf5_episode
from .lerobot_source import convert_lerobot
from .lerobot_writer import convert_to_lerobot
from .rlds import convert_rlds

__all__ = [
    "compress_hdf5",
    "convert_lerobot",
    "convert_rlds",
    "convert_to_lerobot",
    "truncate_hdf5",
    "write_hdf5_episode",
]
