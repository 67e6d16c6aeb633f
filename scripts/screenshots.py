"""python scripts/screenshots.py PAGE.html [PAGE.html …] --out FOLDER

Each page as a PNG of its whole length, 1280 and 390 pixels wide, in light and dark. Needs Chromium or Chrome; without
one it says so and exits with 0, as tests are skipped there.
"""

import argparse
import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS_PX = (1280, 390)  # a laptop; a phone (most of those sold since 2020 are 360 to 430 wide)
SCHEMES = ("light", "dark")
ENDED = "the browser has ended by itself"
MISSING = f"no browser on the path ({', '.join(BROWSERS)})"
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage --remote-debugging-pipe"
).split()


def find() -> str | None:
    """Path of a browser, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Browser:
    """A headless browser with one tab, spoken to through two pipes: no port is opened, no package needed.

    Protocol: https://chromedevtools.github.io/devtools-protocol/
    """

    def __init__(self, path: str) -> None:
        """Start it. Raises EOFError where it ends at once."""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, ours = os.pipe(), os.pipe()  # they read and write at descriptors 3 and 4
        command = [path, *QUIET, f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{ours[1]}', "bash", *command],
            pass_fds=(theirs[0], ours[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs[0])
        os.close(ours[1])
        self._to, self._from = os.fdopen(theirs[1], "wb", buffering=0), os.fdopen(ours[0], "rb", buffering=0)
        self._asked, self._rest, self._session, self._loaded = 0, b"", "", False
        try:
            target = self._ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            self._ask("Page.enable")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._to.close()
        self._from.close()
        self._profile.cleanup()

    def open(self, page: Path, width_px: int, scheme: str) -> None:
        """Show a file as a screen of that width would, in the light or dark scheme."""
        size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": width_px < 500}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded = False  # it can be told before the answer to the question
        self._ask("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._next()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives on the open page. Raises RuntimeError where it throws."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def png(self) -> bytes:
        """The whole open page as a PNG file."""
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        return base64.b64decode(self._ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._asked += 1
        said = {"id": self._asked, "method": method, "params": parameters}
        said |= {"sessionId": self._session} if self._session else {}
        try:
            self._to.write(json.dumps(said).encode() + b"\0")
        except BrokenPipeError as error:
            raise EOFError(ENDED) from error
        while (answer := self._next()).get("id") != self._asked:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        """The next message of the browser. Raises EOFError where it has ended."""
        while b"\0" not in self._rest:
            part = self._from.read(1 << 16)
            if not part:
                raise EOFError(ENDED)
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        said: dict[str, Any] = json.loads(message)
        self._loaded |= said.get("method") == "Page.loadEventFired"
        return said


def main() -> None:
    parser = argparse.ArgumentParser(description="screenshots of pages, at two widths, in light and dark")
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE.html")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the PNG files (default: here)")
    options = parser.parse_args()
    if missing := [str(page) for page in options.pages if not page.is_file()]:
        parser.error(f"not there: {', '.join(missing)}")
    if not (path := find()):
        print(f"skipped: {MISSING}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Browser(path)) as browser:
        for page in options.pages:
            for width_px in WIDTHS_PX:
                for scheme in SCHEMES:
                    browser.open(page, width_px, scheme)
                    shot = options.out / f"{page.stem}-{width_px}-{scheme}.png"
                    shot.write_bytes(browser.png())
                    print(shot)


if __name__ == "__main__":
    main()
