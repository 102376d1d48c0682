"""Beyond one machine: a real scheduler and its workers, one of them killed, change no number."""

import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config

from helpers.study import run_seeds
from tests import dask_cluster
from tests.dask_cluster import Cluster
from tests.test_gate import ROOT
from tests.test_sweep import notebook, points, running

distributed = pytest.importorskip("distributed", reason="an extra: pip install -e '.[sweep]'")


@pytest.fixture
def cluster(tmp_path, request):
    folder = tmp_path / "dask"
    folder.mkdir()
    cluster = Cluster(folder, threads=request.param)
    yield cluster
    cluster.close()


def swept(path, *options):
    command = [sys.executable, "-m", "helpers.sweep", str(path), "--grid", "seed=0:16", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("cluster", [(1, 1)], indirect=True)
def test_a_sweep_survives_a_killed_worker_and_makes_the_table_that_one_machine_makes(
    tmp_path, cluster
):
    work = "import time\nimport numpy as np\ntime.sleep(.2)\n1 / (seed - 5)\n"
    work += "record(drawn=np.random.default_rng(seed).normal(), word=name)"
    path, tables = notebook(tmp_path, work), {}
    more = ["-p", "name", str(tmp_path / "here"), "--out", str(tmp_path / "dask.csv")]
    there = swept(path, "--scheduler", cluster.address, *more)
    while len(points(tmp_path)) < 4 and there.poll() is None:
        time.sleep(0.02)
    cluster.kill(1)
    told, errors = (text.decode() for text in there.communicate())
    assert there.returncode == 1 and "16 points, 0 of an earlier run; 15 ok, 1 failed" in told
    assert errors.count("\n") == 2 and "ZeroDivisionError" in errors, errors
    for kept in points(tmp_path):
        kept.unlink()
    here = swept(path, *more[:3], "--out", str(tmp_path / "here.csv"))
    assert here.communicate() and here.returncode == 1
    for name in ("dask", "here"):
        table = pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False)
        assert (table.pop("seconds") != "").sum() == 15
        tables[name] = table
    assert tables["dask"].equals(tables["here"]) and tables["dask"].seed.tolist() == [*range(16)]
    assert running(tmp_path / "here") == 0


@pytest.mark.parametrize("cluster", [(1, 3)], indirect=True)
def test_seeds_have_the_same_numbers_on_workers_of_several_threads_and_when_one_dies(
    tmp_path, cluster
):
    expected = run_seeds(dask_cluster.drawn, range(8), workers=1)
    flag, lost = str(tmp_path / "died"), "not run, Dask's workers or their scheduler"
    with distributed.Client(cluster.address) as client:
        client.wait_for_workers(2)
        with parallel_config("dask", wait_for_workers_timeout=1):
            found = run_seeds(dask_cluster.drawn, range(8))
            assert np.array_equal(found["sum"], expected["sum"]) and len(set(found["pid"])) == 2
            found = run_seeds(dask_cluster.Dies(5, flag), range(8))
            assert np.array_equal(found["sum"], expected["sum"]) and len(client.ncores()) == 1
            with pytest.warns(UserWarning, match=lost):
                found = run_seeds(dask_cluster.Dies(5), range(8))
    left = [i for i, value in enumerate(expected["sum"]) if value in found["sum"]]
    assert left == [*range(len(left))] and 5 not in left
