"""In which precision this machine multiplies."""

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from farss.precision import computing_dtype, float32_products, multiplies_in

CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16


def test_the_machine_is_asked_for_each_precision():
    assert multiplies_in(torch.float32, CPU)
    assert multiplies_in(torch.float64, CPU)
    assert computing_dtype(torch.float64, CPU) == torch.float64


X86, CPUINFO = platform.machine().lower() in ("x86_64", "amd64"), Path("/proc/cpuinfo")


@pytest.mark.skipif(X86 and not CPUINFO.exists(), reason="reads what Linux says of an x86 CPU")
def test_only_a_cpu_with_units_for_bfloat16_has_them():
    """oneDNN is believed, but for an x86 CPU that emulates them, as those with AVX-512 alone do."""
    units = not X86 or bool({"avx512_bf16", "amx_bf16"} & set(CPUINFO.read_text().split()))
    assert multiplies_in(BFLOAT16, CPU) == (units and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_a_torch_without_onednn_has_no_units(monkeypatch):
    monkeypatch.delattr(torch.ops, "mkldnn", raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", object(), raising=False)
    assert not multiplies_in(BFLOAT16, CPU)


USERS = {
    "nothing": "",
    "overall": "torch.set_float32_matmul_precision('high')",
    "by backend": "torch.backends.fp32_precision = 'tf32'",  # as transformers' tf32=True
    "one backend": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
}


@pytest.mark.parametrize("choice", USERS.values(), ids=USERS)
def test_float32_is_multiplied_as_we_say_and_then_as_the_user_said(choice):
    """In a process of its own: torch forgets none of this."""
    code = textwrap.dedent(f"""
        import torch
        from farss.precision import OF_BACKENDS, float32_products
        def found():
            return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        {choice}
        before = found()
        for how, expected in OF_BACKENDS.items():
            with float32_products(how):
                assert found() == expected, (how, found())
            assert found() == before, (how, found(), before)
        torch.backends.fp32_precision = "tf32"  # whoever chooses later is heard
        assert found() == ("tf32", "tf32"), found()
    """)
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_choice_is_put_back_after_an_error():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), float32_products("medium"):
        1 / 0  # noqa: B018
    assert torch.backends.mkldnn.matmul.fp32_precision == before
