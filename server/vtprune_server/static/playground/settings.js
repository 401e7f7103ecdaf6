// SPDX-License-Identifier: Apache-2.0
// The pruning controls: what the server allows, what the user chose.

const id = (name) => document.getElementById(name);
const share = (value) => Number(value).toFixed(2);

const KV_OFF =
  "This server has no prune layer, so nothing leaves its KV cache. Start it with --prune-layer K to use this slider.";

export class SettingsPanel {
  /** `onVision` is called when what stays of the picture may have changed, `onChange` when any setting has. */
  constructor({ onVision, onChange }) {
    this.onVision = onVision;
    this.onChange = onChange;
    this.presets = {};
    this.pruneLayer = null;
    this.clientControls = true;
    this.readsQuestion = [];
    id("aggressiveness").addEventListener("input", () => this.#update(true));
    id("method").addEventListener("change", () => this.#update(true));
    id("kv-keep").addEventListener("input", () => this.#update(false));
    id("kv-scope").addEventListener("change", () => this.#update(false));
    this.#showValues();
  }

  /** Take the server's facts: caps, methods, presets, and whether there is a prune layer. */
  configure({ policy = {}, model = {}, presets = {}, methods = [], reads_question: readsQuestion = [] }) {
    this.presets = presets;
    this.pruneLayer = model.prune_layer ?? null;
    this.clientControls = policy.client_controls !== false;
    this.readsQuestion = readsQuestion;
    this.#methods(methods, policy.default_method || "inflection");
    this.#presetButtons();
    id("aggressiveness").max = policy.max_aggressiveness ?? 1;
    id("kv-keep").min = Math.max(0.05, policy.min_kv_keep ?? 0);
    id("kv-keep").disabled = id("kv-scope").disabled = this.pruneLayer === null;
    id("kv-hint").textContent =
      this.pruneLayer === null ? KV_OFF : `Share of the prompt that stays above decoder layer ${this.pruneLayer - 1}.`;
    id("controls").disabled = !this.clientControls;
    id("controls-note").hidden = this.clientControls;
    id("controls-note").textContent = "The operator decides the settings of this server; clients cannot change them.";
    this.#begin(policy.default_preset);
  }

  /** The settings under the contract's names; only those that this server lets a client choose. */
  get values() {
    if (!this.clientControls) return {};
    // a preset is more than its numbers: it bounds what stays of a picture
    const preset = Object.keys(this.presets).find((name) => this.#isChosen(this.presets[name]));
    const amount = preset ? { preset } : { aggressiveness: Number(id("aggressiveness").value) };
    const vision = { method: id("method").value, ...amount };
    if (this.pruneLayer === null) return vision;
    return { ...vision, kv_keep: Number(id("kv-keep").value), kv_scope: id("kv-scope").value };
  }

  /** One line that names the settings. */
  get summary() {
    if (!this.clientControls) return "the operator's settings";
    const { method, preset, kv_keep: kvKeep, kv_scope: kvScope } = this.values;
    const scope = kvScope === "vision" ? " of the visual tokens" : "";
    const amount = `aggressiveness ${share(id("aggressiveness").value)}`;
    return `${method}, ${preset ? `${preset} (${amount})` : amount}${kvKeep ? `, KV kept ${share(kvKeep)}${scope}` : ""}`;
  }

  /** Whether another question may keep other patches. */
  get followQuestion() {
    return this.readsQuestion.includes(this.values.method);
  }

  #methods(names, usual) {
    const select = id("method");
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => new Option(name)));
    select.value = names.includes(chosen) ? chosen : names.includes(usual) ? usual : names[0];
  }

  #presetButtons() {
    const buttons = Object.keys(this.presets).map((name) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.dataset.preset = name;
      button.disabled = !this.clientControls;
      button.addEventListener("click", () => this.#apply(this.presets[name]));
      return button;
    });
    id("presets").replaceChildren(...buttons);
  }

  /** The server's default, or `balanced` where that prunes nothing or by load; later calls keep what was chosen. */
  #begin(defaultPreset) {
    const preset = this.presets[["off", "auto"].includes(defaultPreset) ? "balanced" : defaultPreset];
    if (preset && !this.begun) this.#apply(preset);
    else this.#update(true);
    this.begun = true;
  }

  #apply({ aggressiveness, kv_keep: kvKeep }) {
    id("aggressiveness").value = aggressiveness;
    if (this.pruneLayer !== null) id("kv-keep").value = kvKeep;
    this.#update(true);
  }

  #isChosen({ aggressiveness, kv_keep: kvKeep }) {
    const same = aggressiveness === Number(id("aggressiveness").value);
    return same && (this.pruneLayer === null || kvKeep === Number(id("kv-keep").value));
  }

  #showValues() {
    for (const name of ["aggressiveness", "kv-keep"]) {
      const { value, min, max, style } = id(name);
      id(`${name}-value`).textContent = share(value);
      style.setProperty("--fill", `${(100 * (value - min)) / (max - min)}%`);
    }
  }

  #update(vision) {
    this.#showValues();
    this.onChange();
    for (const button of id("presets").children) {
      button.setAttribute("aria-pressed", String(this.#isChosen(this.presets[button.dataset.preset])));
    }
    if (vision) this.onVision();
  }
}
