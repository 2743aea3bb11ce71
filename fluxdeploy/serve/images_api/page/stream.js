// Requests to the server, and the events and errors that it answers with.

const KEY = "fluxdeploy.key";

/** An answer other than what was asked for, in the server's words. */
export class ServerError extends Error {
  constructor(status, message, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The model that is served. */
export async function readModel() {
  const reply = await send("v1/models", {});
  return (await reply.json()).data[0];
}

/** The events of a picture that is being drawn, each as its data. `files` make it an edit. */
export async function* streamPicture(fields, files, signal) {
  const all = { ...fields, stream: true, stream_steps: true, partial_images: 3 };
  const reply = files
    ? await send("v1/images/edits", { method: "POST", body: asForm(all, files), signal })
    : await send("v1/images/generations", { method: "POST", body: asJson(all), signal });
  for await (const text of readEvents(reply.body)) {
    const data = JSON.parse(text);
    if (data.error) throw new ServerError(reply.status, data.error.message, data.error.param);
    yield data;
  }
}

/** A picture's file of an event. */
export function asBlob(data) {
  const bytes = Uint8Array.from(atob(data.b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${data.output_format}` });
}

async function send(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it running?");
  }
  if (!reply.ok) throw await readError(reply);
  return reply;
}

async function readError(reply) {
  try {
    const { message, param } = (await reply.json()).error;
    return new ServerError(reply.status, message, param);
  } catch {
    return new ServerError(reply.status, `The server answered with status ${reply.status}.`);
  }
}

function asJson(fields) {
  return new Blob([JSON.stringify(fields)], { type: "application/json" });
}

function asForm(fields, files) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  for (const [name, file] of Object.entries(files)) if (file) form.append(name, file, name);
  return form;
}

/** The data of server-sent events. EventSource reads them too, and cannot POST. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (pending + value).split("\n\n");
    pending = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((each) => each.startsWith("data:"));
      if (line) yield line.slice("data:".length);
    }
  }
}
