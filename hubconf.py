"""For torch.hub: `torch.hub.load("<owner>/<repository>", "create_model", "vim_tiny", num_classes=10)`."""

from famba import create_model as create_model
from famba import load_vim as load_vim

dependencies = ["torch", "numpy", "jaxtyping", "safetensors"]
