"""The token that a reward service and its clients share."""

from __future__ import annotations

import os
from pathlib import Path

from omninft.types import OmniNFTError

TOKEN_VARIABLE = "OMNINFT_TOKEN"


def read_token(file: str | Path | None = None, variable: str = TOKEN_VARIABLE) -> str | None:
    """The token in a file, else in an environment variable, else None.

    Raises:
        OmniNFTError: a file that cannot be read, a token that is empty or holds other than visible ASCII characters.
    """
    if file is not None:
        try:
            token, where = Path(file).expanduser().read_text(encoding="utf-8").strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise OmniNFTError(f"token file {file}: cannot be read ({error})") from error
    elif variable in os.environ:
        token, where = os.environ[variable].strip(), f"${variable}"
    else:
        return None
    if not token or not all("!" <= character <= "~" for character in token):
        found = "empty" if not token else "a text with blanks or other characters that no header may hold"
        raise OmniNFTError(f"the token of {where} is {found}, expected visible ASCII characters on one line")
    return token
