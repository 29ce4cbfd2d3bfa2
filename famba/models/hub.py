"""Models in folders and on the Hugging Face hub: config.json, model.safetensors and a card, by huggingface_hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from famba.errors import InputError
from famba.models import saved
from famba.models.vim import VisionMamba
from famba.storage import checkpoint

try:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
except ImportError:
    raise InputError("huggingface_hub: not installed; pip install 'famba[hub]'") from None

_CARD = """---
{{ card_data }}
---

# Vision Mamba with token fusion

{{ sizes }}. It removes {{ removed }} tokens of {{ tokens }} by the schedule {{ schedule }} (Famba-V, arXiv:2409.09808).

```python
from famba import VisionMamba

model = VisionMamba.from_pretrained("owner/name")  # this repository, or a folder that holds its files
```
"""


class Published(
    huggingface_hub.PyTorchModelHubMixin,
    library_name="famba",
    paper_url="https://arxiv.org/abs/2409.09808",
    pipeline_tag="image-classification",
    tags=["vision-mamba", "token-fusion"],
    model_card_template=_CARD,
):
    """What the mixin saves, uploads and loads: a model (`module`, as the mixin has it) and its description."""

    module: VisionMamba

    def __init__(self, **described: Any) -> None:
        self.described = self._hub_mixin_config = described

    @classmethod
    def of(cls, model: VisionMamba) -> "Published":
        made = cls(**saved.description(model))
        made.module = model
        return made

    def generate_model_card(self, *args: Any, **kwargs: Any) -> huggingface_hub.ModelCard:
        model = self.module
        sizes = ", ".join(f"{key} {value}" for key, value in model.config.items())
        filled = {"sizes": sizes, "removed": sum(model.schedule), "tokens": model.tokens, "schedule": model.schedule}
        return super().generate_model_card(*args, **filled, **kwargs)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        path = Path(model_file)
        model.module = saved.rebuilt(path, checkpoint.read(path)[0], model.described)
        model.module.to(map_location).eval()
        return model


def load(source: str | Path, **options: Any) -> VisionMamba:
    """The model in a folder or repository; see `VisionMamba.from_pretrained`."""
    allowed = ("cache_dir", "force_download", "local_files_only", "map_location", "revision", "strict", "token")
    if unknown := sorted(set(options) - set(allowed)):  # the mixin would lay them over config.json
        raise InputError(f"{unknown[0]}: not an option of from_pretrained; allowed: {', '.join(allowed)}")
    with _in_one_line(source):
        return Published.from_pretrained(source, **options).module


def download(name: str) -> Path:
    """The one file of weights in a repository, owner/name, or that named, owner/name/file; kept in the cache."""
    owner, repository, *file = name.split("/", 2)
    repository = f"{owner}/{repository}"
    with _in_one_line(name):
        listed = file or huggingface_hub.HfApi().list_repo_files(repository)
        found = [name for name in listed if name.endswith((".safetensors", ".pth", ".pt", ".bin"))]
        if len(found) != 1:
            raise InputError(f"{name}: holds {', '.join(found) or 'no weights'}; give {repository}/<file>")
        with contextlib.suppress(EntryNotFoundError):  # it describes the weights, beside which it comes to lie
            huggingface_hub.hf_hub_download(repository, "config.json")
        return Path(huggingface_hub.hf_hub_download(repository, found[0]))


@contextlib.contextmanager
def _in_one_line(source: str | Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the library raises its own errors, the network's and the system's
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{source}: no such file or folder, and not to be had from the hub ({reason})") from None
