"""What the server of `launch_forked` imports before it forks a rank: no thread, no process group starts with it."""

from megamug.command_line import console

console.import_megatron()

import megamug.checkpoint.saver  # noqa: E402
import megamug.checkpoint.state  # noqa: E402
import megamug.models.jam.cross  # noqa: E402
import megamug.models.language.task  # noqa: E402
import megamug.models.mug.task  # noqa: E402
import megamug.training.optim  # noqa: E402
import megamug.training.pipeline  # noqa: E402, F401
