"""The machine's description, from texts of several systems."""

import json
import os

from netwright.core.machine import _cpuinfo_flags, _sysctl_flags, instruction_sets, machine

X86 = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu sse4_2 avx2 avx512f avx512_vnni amx_int8
processor\t: 1
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd asimddp i8mm sve\n"
MAC = "hw.ncpu: 8\nhw.optional.neon: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.memsize: 1\n"


def test_flags_of_linux():
    assert _cpuinfo_flags(X86) == {"fpu", "sse4_2", "avx2", "avx512f", "avx512_vnni", "amx_int8"}
    assert _cpuinfo_flags(ARM) == {"fp", "asimd", "asimddp", "i8mm", "sve"}
    assert _cpuinfo_flags("") == set()


def test_flags_of_macos():
    assert _sysctl_flags(MAC) == {"hw.optional.neon", "hw.optional.arm.feat_dotprod"}


def test_instruction_sets_by_name(monkeypatch):
    monkeypatch.setattr("netwright.core.machine.platform.system", lambda: "Linux")
    monkeypatch.setattr("netwright.core.machine.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("netwright.core.machine._text", lambda path: X86)
    assert instruction_sets() == ["avx2", "avx512", "vnni", "amx"]
    monkeypatch.setattr("netwright.core.machine._text", lambda path: ARM)
    assert instruction_sets() == ["neon", "dotprod", "i8mm", "sve"]


def test_macos(monkeypatch):
    monkeypatch.setattr("netwright.core.machine.platform.system", lambda: "Darwin")
    monkeypatch.setattr("netwright.core.machine.platform.machine", lambda: "arm64")
    outputs = {("sysctl", "-a"): MAC, ("sysctl", "-n", "machdep.cpu.brand_string"): "Apple M9\n"}
    monkeypatch.setattr("netwright.core.machine._output", lambda *command: outputs[command])
    found = machine()
    assert found["cpu"] == "Apple M9"
    assert found["isa"] == ["neon", "dotprod"]


def test_this_machine():
    found = json.loads(json.dumps(machine()))
    assert {"cpu", "cores", "threads", "torch", "onnxruntime", "os", "python", "isa", "memory_bytes"} == set(found)
    assert found["cpu"]
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["memory_bytes"] > 2**28
