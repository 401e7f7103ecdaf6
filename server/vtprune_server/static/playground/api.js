// SPDX-License-Identifier: Apache-2.0
// The server's routes. URLs are relative to the page, so that a root path in front of the server keeps working.

/** An answer that is not 2xx; the message is the server's sentence. */
export class ApiError extends Error {
  constructor(message, status, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

let apiKey = "";

/** Use this key from now on. It is held in this variable and nowhere else. */
export function setApiKey(key) {
  apiKey = key.trim();
}

export const hasApiKey = () => apiKey !== "";

export const getConfig = () => getJson("vtprune/config");
export const getModels = () => getJson("v1/models");

/** Scores, curve, cut and kept mask of one picture (a data: URL) under some settings; nothing is generated. */
export async function explain(image, settings, question) {
  return (await send("vtprune/explain", { body: { image_url: image, vtprune: settings, question } })).json();
}

const HEADERS = {
  preset: "X-VTPrune-Preset",
  aggressiveness: "X-VTPrune-Aggressiveness",
  method: "X-VTPrune-Method",
  kv_keep: "X-VTPrune-KV-Keep",
  kv_scope: "X-VTPrune-KV-Scope",
};

/**
 * Ask one question about one picture and stream the answer, decoding greedily.
 *
 * `onText` is called with the text so far. Resolves to the text, the usage object, and the milliseconds from
 * sending the request to its first text and to its end, as this browser saw them.
 */
export async function ask({ model, image, question, maxTokens, settings, signal, onText }) {
  const headers = Object.fromEntries(Object.entries(settings).map(([field, value]) => [HEADERS[field], String(value)]));
  const body = {
    model,
    messages: [
      {
        role: "user",
        content: [
          { type: "image_url", image_url: { url: image } },
          { type: "text", text: question },
        ],
      },
    ],
    temperature: 0,
    max_tokens: maxTokens,
    stream: true,
    stream_options: { include_usage: true },
    cache_salt: randomSalt(), // without it a repeated question is answered from the prefix cache
  };
  const start = performance.now();
  const response = await send("v1/chat/completions", { body, headers, signal });
  const result = { text: "", usage: null, firstTextMs: null, totalMs: null };
  for await (const event of serverSentEvents(response.body)) {
    if (event.error) throw errorFrom(event, event.error.code ?? 500);
    result.usage = event.usage ?? result.usage;
    const text = event.choices?.[0]?.delta?.content;
    if (text) {
      result.firstTextMs ??= performance.now() - start;
      result.text += text;
      onText(result.text);
    }
  }
  result.totalMs = performance.now() - start;
  return result;
}

const getJson = async (path) => (await send(path, {})).json();

async function send(path, { body, headers, signal }) {
  const request = { headers: { ...headers }, signal, cache: "no-store", credentials: "same-origin" };
  if (apiKey) request.headers.Authorization = `Bearer ${apiKey}`;
  if (body !== undefined) {
    request.method = "POST";
    request.headers["Content-Type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  throw errorFrom(await response.json().catch(() => null), response.status);
}

/** vLLM's errors are `{"error": {"message", "param"}}`; its key check's and FastAPI's are shorter. */
function errorFrom(body, status) {
  const error = body?.error ?? body?.detail;
  const message = typeof error === "string" ? error : error?.message;
  return new ApiError(message || `The server answered with status ${status}.`, status, error?.param ?? null);
}

async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (buffer + value).split(/\r?\n\r?\n/);
    buffer = events.pop();
    for (const event of events) {
      for (const line of event.split(/\r?\n/)) {
        const data = line.startsWith("data:") ? line.slice(5).trim() : "";
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  }
}

function randomSalt() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
