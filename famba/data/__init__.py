"""Images: where they come from, how they are split and varied, and the batches that training takes."""

from famba.data.datasets import shipped as shipped
from famba.data.loader import Streamed as Streamed
from famba.data.splits import Dataset as Dataset
from famba.data.splits import Split as Split
from famba.data.splits import batches as batches
from famba.data.splits import load as load
from famba.data.splits import normalise as normalise
from famba.data.splits import pictures as pictures
from famba.data.splits import read_image as read_image
from famba.data.splits import renormalised as renormalised
from famba.data.splits import to_device as to_device
