"""Text that is safe to show and to keep: no terminal control sequences, no secrets."""

from __future__ import annotations

import json
import os
import re
from typing import Any

# OSC, DCS and their kin with their whole content; CSI; any other escape; then bare control and bidirectional characters.
_CONTROL = re.compile(
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[ -/]*[0-~]?|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
_SECRET_NAME = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH)(_|$)", re.IGNORECASE)
# Keys of well-known services, bearer headers, passwords in addresses, and in their queries.
_SECRETS = (
    # A run of letters and digits that no name has; what follows it belongs to the key.
    re.compile(r"\b(?:sk|pk|rk|hf|gsk|ghp|gho|ghs|ghu|github_pat)[-_][\w-]{0,40}?(?=[A-Za-z]{0,60}\d)[A-Za-z0-9]{16,}[\w-]*"),
    re.compile(
        r"\b(?:hf_[A-Za-z0-9]{34,}|sk-(?:ant|proj|svcacct|admin|or)-[\w-]{20,}|glpat-[\w.-]{20,}|xox[abp]-[\w-]{20,}|AKIA[A-Z0-9]{16}|AIza[\w-]{30,})"
    ),
    re.compile(r"(?:(?<=bearer )|(?<=authorization: basic ))[^\s\"']{8,}", re.IGNORECASE),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"(?<=[?&])[\w-]*(?:key|token|secret|passw|code|sig|auth)[\w-]*=[^&\s\"']+", re.IGNORECASE),
)


def scrub(value: Any) -> Any:
    """Strings without control sequences and lone surrogates, through lists and dicts."""
    if isinstance(value, str):
        return _CONTROL.sub("", value.encode("utf-8", "replace").decode("utf-8"))
    if isinstance(value, dict):
        return {scrub(str(k)): scrub(v) for k, v in value.items()}
    return [scrub(v) for v in value] if isinstance(value, list | tuple) else value


def plain(text: str) -> str:
    """One line for a terminal: scrubbed, white space joined."""
    return "".join(c if c.isprintable() else " " for c in " ".join(scrub(text).split()))


def json_line(row: dict[str, Any]) -> str:
    """A JSON line that keeps every character and can be shown in a terminal: control characters stand as \\u escapes."""
    text = json.dumps(row, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text) + "\n"


def redact(value: Any) -> Any:
    """Strings without secrets, through lists and dicts: what looks like one, and the values of variables named like one."""
    if isinstance(value, dict):
        return {redact(key): redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    for name, secret in sorted(os.environ.items(), key=lambda item: -len(item[1])):  # one may begin another
        if len(secret) >= 8 and _SECRET_NAME.search(name) and secret in value and not os.path.exists(secret):
            value = value.replace(secret, f"<{name}>")
    for pattern in _SECRETS:
        value = pattern.sub("<secret>", value)
    return value
