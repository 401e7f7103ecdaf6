# SPDX-License-Identifier: Apache-2.0
"""What pruning costs in answers: questions, two runners, statistics, tables and plots.

The data's way: `questions` and `setting` -> a runner (`local` on transformers, `remote` over HTTP) -> replies
-> `measure` (accuracy, agreement, intervals) -> `tables` and `plots`. `study` is the one command behind the
results in docs/evaluation.
"""
