"""What a container may take of its machine: limits of control groups, version 1 and 2."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from punster import doctor, machine


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files in which the system tells about itself, to be filled by a test; a machine of 64 GB without one."""
    found: dict[str, str] = {}
    monkeypatch.setattr(machine, "told", lambda path: found.get(path, "").splitlines())
    for module in (machine, doctor):
        monkeypatch.setattr(module, "installed_bytes", lambda: 64 * 10**9)
    return found


def test_without_control_groups_the_machine_is_all_there_is(files: dict[str, str]) -> None:
    assert machine.cpu_quota() == math.inf
    assert machine.memory_bytes() == machine.available_bytes() == 64 * 10**9


def test_limits_of_all_groups_hold_in_version_two(files: dict[str, str]) -> None:
    files |= {
        "/proc/self/cgroup": "0::/user.slice/shell\n", "/proc/meminfo": "MemTotal: 62500000 kB\nMemAvailable: 50000000 kB\n",
        "/sys/fs/cgroup/user.slice/cpu.max": "250000 100000\n", "/sys/fs/cgroup/user.slice/shell/cpu.max": "max 100000\n",
        "/sys/fs/cgroup/user.slice/memory.max": "8000000000\n", "/sys/fs/cgroup/user.slice/memory.current": "5000000000\n",
        "/sys/fs/cgroup/user.slice/memory.stat": "anon 3500000000\ninactive_file 1500000000\nactive_file 7\n",
        "/sys/fs/cgroup/user.slice/shell/memory.max": "max\n", "/sys/fs/cgroup/user.slice/shell/memory.current": "1\n",
    }  # fmt: skip
    assert machine.cpu_quota() == 2.5
    assert machine.memory_bytes() == 8 * 10**9
    assert machine.available_bytes() == 4_500_000_000  # of 5 GB taken 1.5 are copies of files


def test_a_container_of_version_one_sees_its_limits_at_the_root(files: dict[str, str]) -> None:
    files |= {
        "/proc/self/cgroup": "5:cpu,cpuacct:/docker/0af3\n4:memory:/docker/0af3\n3:cpuset:/docker/0af3\n",
        "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000000",
    }  # fmt: skip
    assert machine.cpu_quota() == 4
    assert machine.memory_bytes() == 64 * 10**9
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1"
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "3000000000"
    assert machine.cpu_quota() == math.inf
    assert (machine.memory_bytes(), machine.available_bytes()) == (3 * 10**9, 2 * 10**9)


def test_limits_of_a_job_hold_for_its_steps_in_version_one(files: dict[str, str]) -> None:
    job = "/sys/fs/cgroup/memory/slurm/job_5"
    files |= {
        "/proc/self/cgroup": "4:memory:/slurm/job_5/step_0\n0::/\nnonsense\n",
        f"{job}/memory.limit_in_bytes": "8000000000", f"{job}/memory.usage_in_bytes": "7500000000",
        f"{job}/memory.stat": "inactive_file 0\ntotal_inactive_file 5000000000\n",
        f"{job}/step_0/memory.limit_in_bytes": "9223372036854771712", f"{job}/step_0/memory.usage_in_bytes": "7400000000",
    }  # fmt: skip
    assert (machine.memory_bytes(), machine.available_bytes()) == (8 * 10**9, 5_500_000_000)


def test_what_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"model \xff\n2\n")
    assert machine.told(str(tmp_path / "odd")) == ["model \ufffd", "2"]
    assert machine.told(str(tmp_path)) == machine.told(str(tmp_path / "missing")) == []


def test_doctor_tells_of_limits(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files |= {
        "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "50000 100000", "/sys/fs/cgroup/memory.max": "4000000000",
        "/sys/fs/cgroup/memory.current": "2000000000",
    }  # fmt: skip
    monkeypatch.setenv("PUNSTER_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("punster.train.plan.measured_speed", lambda dtype, device, seconds: 1e9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert doctor.doctor() == 0
    said = capsys.readouterr().out
    assert "4.0 GB (the limit of this process; the machine has 64.0), 2.0 GB available" in said
    assert f"the time of 0.5 of {os.cpu_count()} cores, and OMP_NUM_THREADS asks for 2 threads: slow" in said


@pytest.mark.parametrize(
    ("quota", "asked", "threads"), [(2.5, None, 2), (0.4, None, 1), (16.0, None, 8), (math.inf, None, 8), (2.0, "8", 8)]
)
def test_no_more_threads_than_the_limit_has_processors(
    quota: float, asked: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: taken[-1])
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    machine.fit_threads.cache_clear()
    machine.fit_threads()
    assert taken[-1] == threads
    taken.append(5)  # what is said after that stays
    machine.fit_threads()
    assert taken[-1] == 5
    machine.fit_threads.cache_clear()


def test_loading_a_model_fits_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from punster.errors import UserError
    from punster.model import load

    called: list[bool] = []
    monkeypatch.setattr(load, "fit_threads", lambda: called.append(True))
    with pytest.raises(UserError):
        load.load_model("/no/such/model")
    assert called


@pytest.mark.parametrize(
    ("given", "found"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_waiting_threads_give_up_their_cores_unless_the_user_has_said_how(given: dict[str, str], found: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, sys, punster; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found, "False"]


@pytest.mark.skipif(
    "libgomp" not in " ".join(map(str, Path(torch.__file__).parent.glob("lib/*"))), reason="this torch has another OpenMP"
)
def test_openmp_takes_the_setting() -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", "import punster, torch"],
        env=clean | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr
