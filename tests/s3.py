"""A real S3 endpoint on loopback: a moto server in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from s3fs import S3FileSystem

BUCKET = "crops"


class S3Server:
    """Empty at each start, at the same address; found by the variables that every S3 client reads."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it answers and has the bucket. `environment` must be set."""
        assert os.environ["AWS_ENDPOINT_URL"] == self.environment["AWS_ENDPOINT_URL"]
        S3FileSystem.clear_instance_cache()  # this process may know another server, which is gone
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            assert self._process.poll() is None and time.monotonic() < deadline, "moto did not start"
            time.sleep(0.1)
        self.filesystem.mkdir(BUCKET)

    def stop(self) -> None:
        """Forgets everything and answers nobody."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)

    @property
    def filesystem(self):  # noqa: ANN201 - s3fs has no types
        """To look at what lies there."""
        return S3FileSystem(endpoint_url=self.environment["AWS_ENDPOINT_URL"], use_listings_cache=False)
