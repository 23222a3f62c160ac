// What the page asks of the server, and what it makes of the answers.

/** What went wrong, in a line for who sits in front of the page. `remedy` is what would help: again, or a key. */
export class Trouble extends Error {
  constructor(message, remedy = "again") {
    super(message);
    this.remedy = remedy;
  }
}

const LOST = "The connection was lost before the answer was whole.";

/** The names of what can be asked for. */
export async function models(key) {
  const response = await ask("v1/models", key);
  const { data } = await response.json();
  return data.map((model) => model.id);
}

/**
 * The answer to a chat request, as it is written: {text}, and at the end {reason} and {usage}.
 * Throws Trouble, also in the middle, or AbortError where `signal` says so.
 */
export async function* answer(request, key, signal) {
  const response = await ask("v1/chat/completions", key, {
    method: "POST",
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = parsed(data);
    if (event.error) throw new Trouble(sentence(event.error.message));
    const [choice] = event.choices ?? [];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { reason: choice.finish_reason };
    if (event.usage) yield { usage: event.usage };
  }
  throw new Trouble(LOST);
}

async function ask(path, key, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refused(response, Boolean(key));
  return response;
}

async function refused(response, hadKey) {
  const { error } = await response.json().catch(() => ({}));
  const said = sentence(error?.message ?? `it answers with status ${response.status}`);
  const wait = Number(response.headers.get("Retry-After"));
  const when = wait > 0 ? `Try again in ${wait} second${wait === 1 ? "" : "s"}.` : "Try again in a moment.";
  if (response.status === 401) return new Trouble(hadKey ? "The server does not take this API key." : "The server asks for an API key.", "key");
  if (response.status === 429) return new Trouble(`The server is busy: too many requests wait already. ${when}`);
  if (response.status === 503) return new Trouble(`The server is not ready: ${said} ${when}`);
  if (error?.code === "context_length_exceeded") {
    return new Trouble(`The conversation is too long: ${said} Edit the last message, or begin a new conversation.`);
  }
  return new Trouble(`The server refuses: ${said}`);
}

function sentence(words) {
  return /[.!?]$/.test(words) ? words : `${words}.`;
}

function parsed(data) {
  try {
    return JSON.parse(data) ?? {};
  } catch {
    throw new Trouble("The server sent something that is no answer.");
  }
}

/** The data of server-sent events. Left early, the connection is given up. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) yield data.splice(0).join("\n");
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new Trouble(LOST);
  } finally {
    reader.cancel().catch(() => {});
  }
}
