"""Devices: the built-in ones, the machine at hand, and a user's own file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from xllm_lab.errors import ConfigError
from xllm_lab.hardware import BUILT_IN, DTYPES, Device, Link, hardware, read_hardware

NAMES = tuple(read_hardware(BUILT_IN))
FIGURES = {
    "matrix_flops_per_s": "{ bf16 = 1e14 }",
    "vector_flops_per_s": "1e13",
    "hbm_bytes": "8e9",
    "hbm_bytes_per_s": "1e12",
    "matrix_frac": "0.9",
    "hbm_frac": "0.9",
    "kernel_us": "2",
    "launch_us": "5",
    "link": "{ bytes_per_s = 1e11, latency_us = 1, num_devices = 8, frac = 0.9 }",
    "far_link": "{ bytes_per_s = 1e10, latency_us = 5, num_devices = 64, frac = 0.9 }",
}


def written(folder: Path, *, without_source: str = "", extra: str = "", **changes: str | None) -> Path:
    """A hardware file of one card; a figure changed to `None` is left out."""
    figures = {k: v for k, v in {**FIGURES, **changes}.items() if v is not None}
    lines = ["[card]", *(f"{k} = {v}" for k, v in figures.items()), extra, "[card.sources]"]
    lines += [f'{k} = "data sheet, 2026"' for k in figures if k != without_source]
    path = folder / "my.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_of_a_built_in_device_has_a_dated_source(name: str) -> None:
    device = hardware(name)
    for figure in FIGURES:
        assert re.search(r"20\d\d|910B2|910C|PCI-SIG|the same|assumed", device.sources[figure]), figure
    assert set(device.matrix_flops_per_s) <= set(DTYPES)


def test_the_devices_that_are_asked_for() -> None:
    wanted = {f"ascend-{part}" for part in ("910b1", "910b2", "910b3", "910b4", "910c", "950pr", "950dt")}
    assert set(NAMES) == wanted | {"h100", "h200", "a100", "rtx-4090", "rtx-pro-6000"}
    assert hardware("Ascend-A3") is hardware("ascend-910c")


def test_a_device_like_another_differs_in_what_it_says() -> None:
    h100, h200 = hardware("h100"), hardware("h200")
    assert h200.hbm_bytes == 141e9
    assert h200.matrix_flops_per_s == h100.matrix_flops_per_s
    assert h200.sources["link"] == f"{h100.sources['link']} (as h100)"


def test_this_cpu_says_that_it_was_measured() -> None:
    device = hardware("this-cpu")
    assert hardware("this-cpu") is device
    assert "measured with numpy" in device.sources["hbm_bytes_per_s"]
    assert 1e8 < device.flops_per_s("fp32") < 1e15
    assert 1e8 < device.hbm_bytes_per_s < 1e13


def test_links() -> None:
    device = hardware("ascend-910b2")
    assert device.link_for(8) is device.link
    assert device.link_for(9) is device.far_link
    link = Link(bytes_per_s=1e9, latency_us=3.0, num_devices=2, frac=0.5)
    assert link.us(1e6) == pytest.approx(2000.0)
    with pytest.raises(ConfigError, match="5000 devices of ascend-910b2 are asked to work together; up to 4096"):
        device.link_for(5000)


def test_a_format_without_matrix_units_is_refused() -> None:
    assert hardware("h100").flops_per_s("fp8") == pytest.approx(0.8 * 1978.9e12)
    with pytest.raises(ConfigError, match="ascend-910c has no matrix units for fp8; accepted are bf16, int8, fp32"):
        hardware("ascend-910c").flops_per_s("fp8")


def test_a_users_file(tmp_path: Path) -> None:
    device = hardware(written(tmp_path))
    assert isinstance(device, Device)
    assert (device.name, device.kernel_us, device.link.num_devices) == ("card", 2.0, 8)
    path = tmp_path / "like.toml"
    path.write_text('[card]\nlike = "h100"\nhbm_bytes = 96e9\n[card.sources]\nhbm_bytes = "a mail, 2026"\n')
    assert hardware(path).hbm_bytes_per_s == hardware("h100").hbm_bytes_per_s


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hbm_bytes_per_s": "3.35"}, "card.hbm_bytes_per_s is 3.35; 1e+09 to 1e+15 bytes per second can be right"),
        ({"matrix_flops_per_s": "{ bf16 = 989 }"}, "card.matrix_flops_per_s.bf16 is 989; 1e+09 to 1e+18 operations"),
        ({"matrix_flops_per_s": "1e14"}, "card.matrix_flops_per_s is 100000000000000.0; a table of fp32, bf16"),
        ({"matrix_flops_per_s": "{ bf17 = 1e14 }"}, "card.matrix_flops_per_s.bf17 is unknown; accepted are fp32"),
        ({"hbm_bytes": "80"}, "card.hbm_bytes is 80; 1e+08 to 1e+14 bytes can be right"),
        ({"hbm_bytes": '"80 GB"'}, "card.hbm_bytes is '80 GB'; a number, in bytes, is expected"),
        ({"hbm_bytes": "true"}, "card.hbm_bytes is True; a number"),
        ({"kernel_us": "nan"}, "card.kernel_us is nan; a number, in microseconds"),
        ({"hbm_frac": "91"}, "card.hbm_frac is 91; 0.01 to 1 a fraction"),
        ({"link": "{ bytes_per_s = 0.5, latency_us = 1, num_devices = 8, frac = 1 }"}, "card.link.bytes_per_s is 0.5;"),
        ({"link": "{ bytes_per_s = 1e9 }"}, "card.link: latency_us, num_devices, frac missing"),
        ({"link": "{ speed = 1e9 }"}, "card.link.speed is unknown; accepted are bytes_per_s, latency_us"),
        ({"hbm_bytes": None}, "card: hbm_bytes missing; every figure is expected"),
        ({"hbm_gb": "80"}, "card.hbm_gb is no figure of a device; accepted are matrix_flops_per_s"),
        ({"extra": 'like = "h1000"'}, "card.like is 'h1000'; accepted are ascend-910c"),
        ({"without_source": "hbm_bytes"}, "card.hbm_bytes has no source; a text under card.sources.hbm_bytes"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path: Path, changes: dict[str, str], told: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {told}")):
        hardware(path)


@pytest.mark.parametrize("text", ["[", "card = 3", "", "[a]\nlike='h100'\n[b]\nlike='h100'"])
def test_files_that_hold_no_device_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        hardware(path)


def test_a_source_of_nothing_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text() + '\nhbm = "typed wrongly"\n')
    with pytest.raises(ConfigError, match=r"card.sources.hbm is the source of no figure"):
        read_hardware(path)


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"no hardware 'b9000' is known; accepted are ascend-910c, .*this-cpu"):
        hardware("b9000")


def test_the_built_in_file_is_plain_toml() -> None:
    tomllib.loads(BUILT_IN.read_text(encoding="utf-8"))
