"""The window of ``render_mode="human"``, by pygame, as Gymnasium's own envs have it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from gymnasium.error import DependencyNotInstalled
from numpy.typing import NDArray

HAS_PYGAME = find_spec("pygame") is not None


class Window:
    """Opens when first shown in; raises ``gymnasium.error.DependencyNotInstalled`` if there is no pygame."""

    def __init__(self) -> None:
        if not HAS_PYGAME:
            raise DependencyNotInstalled(
                "render_mode='human' opens a window by pygame, which is not installed; run `pip install pygame`"
            )
        self._opened: tuple[Any, Any] | None = None  # the screen, and a clock

    def __reduce__(self) -> tuple[type[Window], tuple[()]]:
        """A copy is a window of its own, not yet opened."""
        return Window, ()

    def show(self, image: NDArray, fps: float) -> None:
        """Show ``image [height, width, 3]``, no sooner than ``1 / fps`` seconds after the last one."""
        import pygame

        if self._opened is None:
            pygame.display.init()
            self._opened = pygame.display.set_mode(image.shape[1::-1]), pygame.time.Clock()
        screen, clock = self._opened
        screen.blit(pygame.surfarray.make_surface(np.swapaxes(image, 0, 1)), (0, 0))
        pygame.event.pump()
        clock.tick(fps)
        pygame.display.flip()

    def close(self) -> None:
        """Close it, if it was ever opened."""
        if self._opened is not None:
            import pygame

            pygame.display.quit()
            self._opened = None
