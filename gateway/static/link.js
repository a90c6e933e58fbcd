// The websocket, kept alive: reconnects with back-off and goes on with every unfinished answer.
//
// A request that was accepted is resumed behind its last token. One that was not is sent again
// under the same idempotency key, so the server runs it once whatever it had received.

const FIRST_RETRY_MS = 500;
const LONGEST_RETRY_MS = 8000;

export function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// A subprotocol may hold few characters, so the key is percent-encoded.
function keyProtocol(key) {
  const encoded = encodeURIComponent(key).replace(
    /[()]/g,
    (char) => "%" + char.charCodeAt(0).toString(16).toUpperCase(),
  );
  return `openlora.key.${encoded}`;
}

export class Link {
  // onState(state, retryInMs): "connecting" | "open" | "waiting"
  // onNotice(error): an error that belongs to no request
  constructor({ key, onState, onNotice }) {
    this.key = key;
    this.onState = onState;
    this.onNotice = onNotice;
    this.streams = new Map(); // request_id → stream
    this.retryMs = FIRST_RETRY_MS;
    this.socket = null;
    this.timer = 0;
  }

  connect() {
    clearTimeout(this.timer);
    this.onState("connecting");
    const url = new URL("v1/ws", location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const protocols = ["openlora.v1"];
    if (this.key) protocols.push(keyProtocol(this.key));
    const socket = new WebSocket(url, protocols);
    this.socket = socket;
    socket.onopen = () => {
      this.retryMs = FIRST_RETRY_MS;
      this.onState("open");
      this.resumeAll();
    };
    socket.onmessage = (event) => this.receive(JSON.parse(event.data));
    socket.onclose = () => {
      if (this.socket !== socket) return;
      this.socket = null;
      this.onState("waiting", this.retryMs);
      this.timer = setTimeout(() => this.connect(), this.retryMs);
      this.retryMs = Math.min(this.retryMs * 2, LONGEST_RETRY_MS);
    };
  }

  reconnectNow() {
    if (this.isOpen()) return;
    this.retryMs = FIRST_RETRY_MS;
    if (this.socket === null) this.connect();
  }

  close() {
    clearTimeout(this.timer);
    const socket = this.socket;
    this.socket = null;
    socket?.close();
  }

  isOpen() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  // handler: {accepted, token, done, restarted, error}, each given the frame
  generate(body, handler) {
    const stream = {
      requestId: randomId(),
      body: { ...body, idempotency_key: randomId() },
      jobId: null,
      after: -1,
      epoch: 0,
      cancelled: false,
      handler,
    };
    this.start(stream);
    return stream;
  }

  resume(jobId, handler) {
    const stream = {
      requestId: randomId(),
      body: null,
      jobId,
      after: -1,
      epoch: 0,
      cancelled: false,
      handler,
    };
    this.start(stream);
    return stream;
  }

  cancel(stream) {
    stream.cancelled = true;
    this.send({ type: "cancel", request_id: stream.requestId });
  }

  start(stream) {
    this.streams.set(stream.requestId, stream);
    this.send(this.opening(stream));
  }

  opening(stream) {
    const request_id = stream.requestId;
    if (stream.jobId === null) return { type: "generate", request_id, ...stream.body };
    return {
      type: "resume",
      request_id,
      job_id: stream.jobId,
      after: stream.after,
      epoch: stream.epoch,
    };
  }

  resumeAll() {
    const streams = [...this.streams.values()];
    this.streams.clear();
    for (const stream of streams) {
      stream.requestId = randomId();
      this.start(stream);
      if (stream.cancelled) this.cancel(stream);
    }
  }

  send(frame) {
    // what cannot be sent now is sent by resumeAll
    if (this.isOpen()) this.socket.send(JSON.stringify(frame));
  }

  receive(frame) {
    const stream = this.streams.get(frame.request_id);
    if (!stream) {
      if (frame.type === "error" && frame.request_id === null) this.onNotice(frame);
      return;
    }
    if (frame.type === "accepted") stream.jobId = frame.job_id;
    else if (frame.type === "token") {
      stream.after = frame.index;
      stream.epoch = frame.epoch ?? stream.epoch;
    } else if (frame.type === "restarted") stream.after = -1;
    else this.streams.delete(frame.request_id);
    stream.handler[frame.type]?.(frame);
  }
}
