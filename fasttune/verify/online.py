"""Only with --online: is the hub there, is the token good, may it read Llama. The token itself is never printed."""

import os
from collections.abc import Iterator

from fasttune.verify import Result

GATED = "meta-llama/Llama-3.1-8B"  # what the H100 configs train
TIMEOUT_S = 10


def hub() -> Iterator[Result]:
    import httpx
    from huggingface_hub import constants

    try:
        answer = httpx.head(constants.ENDPOINT, timeout=TIMEOUT_S, follow_redirects=True)
    except httpx.HTTPError as error:
        detail = f"{constants.ENDPOINT} cannot be reached: {type(error).__name__}"
        yield Result(
            "online:hub", "fail", detail, f"curl -I {constants.ENDPOINT}  # then: proxy (HTTPS_PROXY), DNS, firewall"
        )
        return
    ok = answer.status_code < 400
    detail = f"{constants.ENDPOINT} answers {answer.status_code} in {answer.elapsed.total_seconds():.1f} s"
    yield Result("online:hub", "pass" if ok else "fail", detail, "" if ok else f"curl -I {constants.ENDPOINT}")


def token() -> Iterator[Result]:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not get_token():
        yield Result("online:token", "warn", "no token: gated models such as Llama cannot be loaded", "hf auth login")
        return
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
    try:
        name = HfApi().whoami()["name"]
    except HfHubHTTPError as error:
        detail = f"the token of {where} is refused ({error.response.status_code})"
        yield Result(
            "online:token", "fail", detail, "unset HF_TOKEN; hf auth login  # with a new token of your account"
        )
        return
    yield Result("online:token", "pass", f"the token of {where} is valid (user {name})")
    try:
        HfApi().auth_check(GATED)
    except HfHubHTTPError as error:
        detail = f"{name} may not read {GATED} ({error.response.status_code})"
        yield Result("online:llama", "warn", detail, f"accept its licence on https://huggingface.co/{GATED}")
        return
    yield Result("online:llama", "pass", f"{name} may read {GATED}")


CHECKS = {"online:hub": hub, "online:token": token}
