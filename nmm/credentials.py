"""Passwords and tokens inside URLs: found, so that they are refused, and masked in what is said.

https://user:password@host/a.tar       user:password
https://host/a.tar?part=1&sig=abc      abc, by the name of its parameter
"""

import re

MASK = "***"
# A password may hold @ and /, which should be escaped in a URL and often are not.
USER = re.compile(r"(?<=://)(?:[^/?#\s'\"]+|[^/?#\s:]*:(?!\d*(?:[/?#\s'\"]|$))\S*)(?=@)")
PARAMETER = re.compile(
    r"([?&][^=&\s]*(?:sig|token|secret|password|credential|auth|key)[^=&\s]*=)[^&#\s'\"]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text without the credentials of the URLs in it."""
    return PARAMETER.sub(rf"\1{MASK}", USER.sub(MASK, text))


def holds_credentials(text: str) -> bool:
    """Is there a URL with a user, a password or a token in the text?"""
    return masked(text) != text
