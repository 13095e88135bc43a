// Requests to the server that served this page: JSON, and streamed chat completions. The API key stays in this tab.

import { stored, store } from "./dom.js";

let key = stored("sessionStorage", "key", "");
let askForKey = async () => "";

export class ApiError extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// ask(isWrong) resolves to the key that a person gives, or to "" where they give none.
export function onKeyNeeded(ask) {
  askForKey = ask;
}

async function request(path, options) {
  for (;;) {
    const used = key;
    const headers = { ...options.headers };
    if (used) headers.Authorization = "Bearer " + used;
    const response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store", redirect: "error" });
    if (response.status !== 401) {
      if (!response.ok) throw await readError(response);
      return response;
    }
    if (key === used) {  // another request may have asked meanwhile
      key = await askForKey(Boolean(used));
      if (!key) throw await readError(response);
      store("sessionStorage", "key", key);
    }
  }
}

async function readError(response) {
  let message = `HTTP ${response.status}`;
  try {
    const body = await response.json();
    message = typeof body.error?.message === "string" ? body.error.message : message;
  } catch {  // a proxy may answer with HTML
  }
  const wait = Number(response.headers.get("Retry-After"));
  return new ApiError(message, response.status, wait > 0 ? wait : null);
}

export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

// Yields the chunks of a streamed chat completion. Aborting the signal closes the connection, which frees the row.
export async function* streamChat(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(String(chunk.error.message ?? "error"), 200);
    yield chunk;
  }
  throw new ApiError("", 0);  // cut off: the server went away
}

// The data of server-sent events, whatever the pieces in which they arrive.
export async function* readEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
