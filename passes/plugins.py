"""What the passes share that write operators of llmc's own, whose kernels TensorRT runs as plugins."""

from __future__ import annotations

from pydantic import Field

from llmc.passes.base import Pass, Skip
from llmc.passes.graph import DOMAIN


class PluginPass(Pass):
    """A pass that does nothing unless the target runs llmc's plugins."""

    plugins: tuple[str, ...] = Field((), description="Plugins that the target runs; a recipe says it once, in target.")

    def needs_plugin(self) -> None:
        """Raises Skip where the target has no plugin of llmc."""
        if DOMAIN not in self.plugins:
            raise Skip(f"the target runs no plugin '{DOMAIN}' (target.plugins): standard operators stay")
