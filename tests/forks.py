"""Runs scripts in forked processes: real ones to kill, without the seconds that importing torch takes each time."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = """
import importlib, json, os, pathlib, runpy, sys
root = pathlib.Path(os.environ["PYTHONPATH"])
scripts = {file.stem: importlib.import_module(file.stem) for file in root.glob("*.py")}  # and no torch op
for name in ("data.check", "data.curate"):
    importlib.import_module(name)
for line in sys.stdin:
    name, argv, env, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ.update(env)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1), os.dup2(fd, 2)
        sys.argv, sys.stdin = [name + ".py", *argv], open(os.devnull)
        code = 1
        try:
            if name in scripts:
                file = scripts[name].__file__
                exec(compile(open(file).read(), file, "exec"), {"__name__": "__main__"})
            else:  # python -m name
                runpy.run_module(name, run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else e.code is not None
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    if env.get("WAIT", "1") == "1":
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    def __init__(self, cwd=None):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env=env, cwd=cwd or tempfile.mkdtemp())
        self.log = tempfile.mktemp()

    def start(self, script: str, *argv, **env) -> int:
        """-> process id; finish() waits for it. With WAIT="0" in env nobody waits: for ranks that run side by side."""
        open(self.log, "a").close()
        self.server.stdin.write(json.dumps([script, [str(a) for a in argv], env, self.log]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def finish(self) -> tuple[int, str]:
        """-> exit code (negative: killed by that signal) and everything it printed."""
        code = int(self.server.stdout.readline())
        text = Path(self.log).read_text()
        Path(self.log).unlink()
        return code, text

    def run(self, script: str, *argv, ok: int = 0, ranks: int = 1) -> str:
        """Start, wait, check the exit code -> what was printed."""
        port = str(20000 + os.getpid() % 20000 + ranks)
        for rank in range(ranks - 1, -1, -1):  # rank 0 last: it is the one that is waited for
            env = dict(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            env = {name: str(value) for name, value in env.items()} if ranks > 1 else {}
            self.start(script, *argv, **env, WAIT="0" if rank else "1")
        code, text = self.finish()
        assert code == ok, f"exit code {code}\n{text}"
        return text

    def close(self):
        self.server.stdin.close()
        self.server.wait()
