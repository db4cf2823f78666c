"""What an export's record proves, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_words(manifest: Mapping[str, Any]) -> str:
    """One line, without a full stop, of what finetune_export.json says was checked."""
    proof = manifest["proof"]
    parts = [*_merged(proof), _read_back(proof)]
    verified = proof.get("verified")
    if verified:
        found = f"{verified['judge']} loads it"
        if verified["kept"] is None:
            found += f", its logits {verified['max_difference']:.1g} apart at the most"
        elif verified["kept"]["change"] is not None:
            found += f" and keeps {verified['kept']['change']:.1%} of the adapter's change"
        parts.append(found)
    return "; ".join(part for part in parts if part)


def _merged(proof: Mapping[str, Any]) -> list[str]:
    """What merging cost, where there was any."""
    merge = proof.get("merged", proof)
    if "rounding" not in merge:
        return ["merged in bf16"] if merge.get("into") == "bf16" else []
    kept = merge.get("kept")
    if not kept:
        return ["merged into MXFP4 by rounding; what that costs was not measured"]
    name = "gain" if kept["gain_kept"] is not None else "change"
    share = kept[f"{name}_kept"]
    what = f"{share:.1%} of the adapter's {name}" if share is not None else "what there was"
    return [f"merged into MXFP4, which keeps {what} on {kept['tokens']:,} held-out tokens"]


def _read_back(proof: Mapping[str, Any]) -> str:
    if proof.get("equals_trained_bitwise"):
        return "read back, it is what was trained, bit for bit"
    if proof.get("read_back_equal"):
        return "read back, it is what was trained"
    if "bytes_equal_to_the_source" in proof:
        return f"all {proof['bytes_equal_to_the_source']:,} bytes read back equal the source's"
    if "values_read_back" in proof:
        return f"{proof['values_read_back']:,} values read back are right"
    return ""
