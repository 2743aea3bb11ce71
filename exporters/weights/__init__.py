"""Where a component's weights lie: `decide` says what becomes of each, `bind` and `write` do it."""
