# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM that the plugin and the front end lean on, and whether a vLLM still has it as it was.

`uses` reads the imports, the overridden methods and the calls to a base class off our own sources;
`declared` adds by hand what no parser can see (replaced methods, assumed orders, words that vLLM writes);
`source_tree` looks a name up in a vLLM by reading its files, without importing it; `record` compares.

    python -m vllm_vtprune.hooks            # the installed vLLM against the record of its version
    python -m vllm_vtprune.hooks PATH       # an unpacked wheel: what moved since the newest record
    python -m vllm_vtprune.hooks --write    # write the record of the installed vLLM (or of PATH)

A record finds names that moved. It cannot find a new way round a hook: the contract tests are for that.
"""
