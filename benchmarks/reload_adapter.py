"""Load a saved adapter with plain PEFT, in a process that never imports peftkern, and write its logits.

    python -m benchmarks.reload_adapter ADAPTER_FOLDER MODEL_CACHE DEVICE DTYPE BASE IDS_FILE LOGITS_FILE

BASE is "dense", or what bitsandbytes quantises the linear layers to. The demo runs this to show that what peftkern
trained is an ordinary PEFT adapter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks import smollm2


def main(arguments: list[str]) -> None:
    """Read token ids, write the logits that the reloaded model gives."""
    adapter, cache, device, dtype, quant, ids_file, logits_file = arguments
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    base = smollm2.load_model(getattr(torch, dtype), device, Path(cache))
    if quant != "dense":
        smollm2.quantise(base, quant, getattr(torch, dtype))
    model = PeftModel.from_pretrained(base, adapter).eval()
    ids = load_file(ids_file, device=device)["ids"]
    with torch.no_grad():
        values = model(input_ids=ids).logits.float().cpu()
    if any(name.partition(".")[0] == "peftkern" for name in sys.modules):
        raise SystemExit("peftkern was imported: this process proves nothing")
    save_file({"logits": values.contiguous()}, logits_file)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
