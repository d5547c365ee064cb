"""Posts standard input as JSON to the address in ``EVERSTEP_HOOK_URL``: a program of its own, so that whoever starts it can end it.

The address is not an argument, because everybody on the machine can read those, and addresses of webhooks are secrets. It tries
again, doubling its wait, until it is ended from outside or refused for good (any 4xx but 408 and 429).
"""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request

FIRST_WAIT, LONGEST_WAIT, TIMEOUT = 0.5, 8.0, 30.0  # seconds
NOT_FOR_GOOD = (408, 429)


class _Stay(urllib.request.HTTPRedirectHandler):
    """What is told to one address is not told to another."""

    def redirect_request(self, *_: object) -> None:
        """Do not go there."""
        return


def main() -> int:
    """Exit code 0 once somebody has taken it."""
    body = sys.stdin.buffer.read()
    headers = {"Content-Type": "application/json", "User-Agent": "everstep"}
    request = urllib.request.Request(os.environ["EVERSTEP_HOOK_URL"], body, headers, method="POST")
    opener = urllib.request.build_opener(_Stay)
    wait = FIRST_WAIT
    while True:
        try:
            with opener.open(request, timeout=TIMEOUT):
                return 0
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}"
            if error.code < 500 and error.code not in NOT_FOR_GOOD:
                sys.stderr.write(f"webhook: {why}\n")
                return 1
        except (OSError, ValueError) as error:
            why = str(getattr(error, "reason", error))
        sys.stderr.write(f"webhook: {why}; again in {wait:g} s\n")
        sys.stderr.flush()
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


if __name__ == "__main__":
    sys.exit(main())
