"""A model's chat template is a program: it is tried in a process with little time and memory before it runs in ours.

Run as a program this file is that process: it reads a JSON object from standard input and ends with `TOO_MUCH` where
the template asks for too much, and with 0 where it does not, rightly or with an error.
"""

import functools
import json
import math
import subprocess
import sys
import time

SECONDS = 5  # of the processor
MEMORY = 2**30  # bytes of addresses
TOO_MUCH = 3
CONVERSATIONS = ("user", "user assistant", "system user", "system user assistant user assistant")  # by their roles


@functools.lru_cache
def is_bounded(template: str) -> bool:
    """Whether `template` renders short conversations within `SECONDS` and `MEMORY`, or refuses them soon enough."""
    given = json.dumps({"path": sys.path, "template": template, "seconds": SECONDS})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", __file__],
            input=given.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=20 * SECONDS,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return False
    return 0 <= done.returncode != TOO_MUCH


def _serve() -> None:
    given = json.load(sys.stdin)
    sys.path[:] = given["path"]
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + given["seconds"]),) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):  # as far as the system can
        pass
    for roles in CONVERSATIONS:
        turns = [{"role": role, "content": "text"} for role in roles.split()]
        try:
            render_jinja_template(
                [turns], chat_template=given["template"], add_generation_prompt=roles.endswith("user")
            )
        except MemoryError:
            sys.exit(TOO_MUCH)
        except Exception:
            pass  # it is told where it counts


if __name__ == "__main__":
    _serve()
