"""Commands that Cinder starts while the driver has connections."""

from __future__ import annotations

import os
import subprocess
import time

from cinder_dmlocal.tests.base import DriverTestCase


class Commands(DriverTestCase):
    def test_a_command_begins_without_threads_of_grpc(self) -> None:
        # They would find their files closed and end the command before it is one.
        self.cinder.create()
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)

        def before_it_is_one() -> None:
            # Threads take a moment to begin, if there are any.
            until = time.monotonic() + 0.2
            while (count := len(os.listdir('/proc/self/task'))) == 1:
                if time.monotonic() > until:
                    break
            os.write(writing, str(count).encode())

        subprocess.run(['true'], preexec_fn=before_it_is_one, check=True)
        os.close(writing)
        self.assertEqual(b'1', os.read(reading, 10))
