# SPDX-License-Identifier: Apache-2.0
"""`vtprune calibrate`: finds a prune schedule, and the presets' aggressiveness, for a model and its pictures.

The data's way: questions -> trials of a schedule (`trials`, remembered by `journal`) -> a search over
schedules (`search`, pure functions) -> confirmation on questions held out -> a file for `vtprune serve`
(`document`) and a plot.
"""
