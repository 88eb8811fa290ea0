"""Secrets in addresses: found, masked, and taken from the environment."""

import pytest

from forescale.ground.errors import UserError, masked, secret_in, with_secrets

SECRETS = [
    "https://me:pw123@host/d",
    "https://ghp_pw123@host/d",
    "s3://me:pw123@bucket/d",
    "ftp://me:pw123@host:21/d",
    "https://host/d?X-Amz-Credential=me&X-Amz-Signature=pw123",
    "https://host/d?sv=2020&sig=pw123",
    "https://host/d?token=pw123#part",
    "https://host/d?api_key=pw123",
    "https://host/d?AWSAccessKeyId=me&Signature=pw123",
    "gs://bucket/d?access_token=pw123",
]
HARMLESS = [
    "https://host/d", "https://host:8080/d?download=1&version=3", "s3://bucket/a@b", "sftp://me@host/d",
    "https://$FORESCALE_SECRET_LOGIN@host/d", "https://host/d?$FORESCALE_SECRET_SAS", "a?token=b c",
    "/a/b?token=x",
]  # fmt: skip


@pytest.mark.parametrize("address", SECRETS)
def test_a_secret_is_found_and_masked(address):
    assert secret_in(address)
    for text in (address, f"a ({address}), b", f"data.path={address}: is '{address}'."):
        assert "pw123" not in masked(text)
        assert "://" in masked(text)
    assert "pw123" not in str(UserError(address, f"can't read {address}", f"see {address}"))
    assert not secret_in(masked(address))


@pytest.mark.parametrize("address", HARMLESS)
def test_what_is_no_secret_is_none(address):
    assert secret_in(address) is None


def test_a_masked_address_still_says_what_it_is():
    assert masked("a https://me:x@host/d?sig=1, b") == "a https://host/d?..., b"
    named = "https://$FORESCALE_SECRET_LOGIN@host/d?$FORESCALE_SECRET_SAS"
    assert masked(f"see {named}.") == f"see {named}."


def test_variables_are_filled_in_for_the_request_and_masked_in_what_comes_back(monkeypatch):
    monkeypatch.setenv("FORESCALE_SECRET_LOGIN", "me:p w/1@")
    monkeypatch.setenv("FORESCALE_SECRET_SAS", "?sv=1&sig=a%2Fb")
    named = "https://$FORESCALE_SECRET_LOGIN@host/d?$FORESCALE_SECRET_SAS"
    filled = with_secrets(named)
    assert filled == "https://me:p%20w%2F1%40@host/d?sv=1&sig=a%2Fb"
    assert "a%2Fb" not in masked("Max retries exceeded with url: /d?sv=1&sig=a%2Fb (refused)")
    assert "p w/1@" not in masked("401 for me:p w/1@")
    with pytest.raises(LookupError, match="FORESCALE_SECRET_OTHER"):
        with_secrets("https://host/d?$FORESCALE_SECRET_OTHER")
