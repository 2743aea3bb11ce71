"""From a prompt to pictures: `pipeline` takes the call, `loop` runs the steps, `tasks` say how a
picture starts."""
