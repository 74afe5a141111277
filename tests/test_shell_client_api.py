"""The shell's view of the client: pages of a stream."""

from collections.abc import AsyncIterator

import pytest

from kvtcp.shell.client_api import PAGE_ITEMS, in_pages


@pytest.mark.parametrize("count", [0, 1, PAGE_ITEMS - 1, PAGE_ITEMS, PAGE_ITEMS + 1, 2 * PAGE_ITEMS])
async def test_pages(count: int) -> None:
    """All items come, in order, in full pages up to the last, and no page is empty."""

    async def items() -> AsyncIterator[int]:
        for number in range(count):
            yield number

    pages = [page async for page in in_pages(items())]
    assert [number for page in pages for number in page] == list(range(count))
    assert all(len(page) == PAGE_ITEMS for page in pages[:-1]) and all(pages)
