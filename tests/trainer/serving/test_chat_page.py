"""The page of `forescale serve`, in a real browser."""

import pytest

from tests.trainer.serving.client import serving

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_chats_stops_and_continues_a_text(trained, browser, monkeypatch, width):
    monkeypatch.setenv("FORESCALE_API_KEY", "secret")
    faults = list[Exception]()
    for server in serving(trained):
        page = browser.new_page(viewport={"width": width, "height": 800}, bypass_csp=True)
        page.on("pageerror", lambda error: faults.append(error))
        page.goto(f"http://127.0.0.1:{server.address[1]}/")
        page.get_by_text("Incorrect API key").wait_for()
        page.get_by_label("Key of this server").fill("secret")
        page.get_by_label("Key of this server").press("Tab")
        page.get_by_role("heading", name="small").wait_for()
        assert page.get_by_label("What to do").input_value() == "text", "it learned no chats"

        page.get_by_label("Most tokens").fill("5")
        page.get_by_label("Your message").fill("def <b>main")
        page.get_by_label("Your message").press("Enter")
        page.get_by_text("5 tokens").wait_for()
        assert page.locator(".turn.text").inner_text().startswith("def <b>main")

        page.get_by_label("What to do").select_option("chat")
        page.get_by_label("Your message").fill("one")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("5 tokens").wait_for()
        assert page.locator(".turn.user").all_inner_texts() == ["one"]
        page.reload()
        page.get_by_label("Key of this server").fill("secret")
        page.get_by_label("Key of this server").press("Tab")
        page.locator(".turn.user").wait_for()
        page.get_by_role("button", name="New").click()
        assert page.locator(".turn.user").count() == 0

        page.get_by_label("Most tokens").fill("400")
        page.get_by_label("Your message").fill("too many")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("'max_tokens' must be").wait_for()
        assert page.get_by_label("Your message").input_value() == "too many", "nothing is lost"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert faults == []
        page.close()
