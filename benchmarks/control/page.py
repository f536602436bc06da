"""The page of the comparison."""


def render(results: object) -> str:
    return ""


def draw(results: object) -> None:
    pass
