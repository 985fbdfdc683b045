"""The README.md beside an exported adapter, and its way to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from omninft.config import LoraConfig
from omninft.files import write_text
from omninft.models.lora_file import FILE_NAME, PEFT_FILE
from omninft.types import OmniNFTError

Form = Literal["common", "peft", "merged"]
CARD = "README.md"

_USE: dict[Form, str] = {
    "common": f"""\
`{FILE_NAME}` has the original names of modules and no alpha (it is folded in), which all programs below take at full
strength.

| program | how |
|---|---|
| diffusers | `pipe.load_lora_weights("FOLDER", weight_name="{FILE_NAME}")` |
| ComfyUI | copy it to `models/loras`, and load it by *LoraLoaderModelOnly* |
| WanGP | copy it to the model's LoRA folder |
| ltx-pipelines (ltx-core) | give it as a LoRA with its strength |
| OmniNFT | `omninft sample --lora FOLDER`, or `model.lora.init=FOLDER` to train on |
""",
    "peft": f"""\
`{PEFT_FILE}` has diffusers' names of modules; alpha is in `adapter_config.json`.

    from peft import PeftModel
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "FOLDER")

OmniNFT: `omninft sample --lora FOLDER`, or `model.lora.init=FOLDER` to train on.
""",
    "merged": """\
`transformer/` has full weights, the adapter added to them.

    transformer = LTX2VideoTransformer3DModel.from_pretrained("FOLDER", subfolder="transformer", torch_dtype=...)
    pipe = LTX2Pipeline.from_pretrained("BASE", transformer=transformer, torch_dtype=...)
""",
}


def write_card(folder: Path, form: Form, base: str, lora: LoraConfig, measured: str | None = None) -> Path:
    """Write README.md: what it is, how each program loads it, what it changes, and whose licences hold.

    Args:
        folder: of the exported form.
        form: what lies there.
        base: hub id or path of the model.
        lora: rank, alpha and targets.
        measured: the table of base against trained, in Markdown; None: nothing was measured.
    """
    hub = not Path(base).exists() and "/" in base
    head = ["---", "license: other", "library_name: " + ("peft" if form == "peft" else "diffusers")]
    head += [f"base_model: {base}"] if hub else []
    head += ["tags: [omninft, text-to-video, text-to-audio" + ("]" if form == "merged" else ", lora]"), "---"]
    kind = "Full weights with a LoRA added" if form == "merged" else "A LoRA"
    where = "the default 28 linears of every block" if lora.targets is None else f"{len(lora.targets)} kinds of linears"
    text = f"""# OmniNFT on {base}

{kind}, trained by online reinforcement learning ([OmniNFT](https://arxiv.org/abs/2605.12480)) on `{base}`: rank \
{lora.rank}, alpha {lora.alpha:g}, on {where}.

## Use

{_USE[form].replace("BASE", base)}
## What it changes

{measured or "No evaluation of base against trained came with this adapter."}
## Licences

It works with the weights of `{base}` alone{", and contains them" if form == "merged" else ""}: their licence holds \
for what is made with it. The rewards that it was trained with, and the prompts, have licences of their own; some \
forbid commercial use (`omninft rewards` lists them).
"""
    write_text(folder / CARD, "\n".join(head) + "\n" + text)
    return folder / CARD


def push(folder: Path, repository: str, api: HfApi | None = None) -> str:
    """Upload a folder to a private model repository of the hub, which is made if need be; its address.

    Raises:
        OmniNFTError: no access, or no such place.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OmniNFTError(
            f"{repository}: cannot be uploaded to ({error}); expected NAME/REPOSITORY of the hub and a token that may "
            "write there (`hf auth login`)"
        ) from error
    return str(address)
