"""A real browser for tests: Debian's Chromium through selenium, with no network but this machine's.

Nothing is downloaded: where Chromium or its driver is not installed, the tests skip and say so.
"""

import json
import os
import shutil
from contextlib import contextmanager

import pytest

HOST = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", HOST]


@contextmanager
def browser():
    """Open Chromium, or skip the test that asks for it."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in found.items() if not path]:
        pytest.skip(f"no {' and no '.join(missing)} here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for option in OPTIONS:
        options.add_argument(option)
    os.environ["SE_OFFLINE"] = "true"
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=found["chromedriver"])
    )
    driver.set_script_timeout(300)  # on a busy machine saving takes its time
    try:
        yield driver
    finally:
        driver.quit()


def emulate(driver, width, *, media="screen", scheme="light"):
    """Let the page believe in another screen: a headless window is never narrower than 500."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def requested(driver):
    """Return the addresses that were asked for since the last call."""
    told = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [
        m["params"]["request"]["url"] for m in told if m["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in sent if not url.startswith("data:")]
