// Drawings of this browser: in memory, and in IndexedDB where the browser lets us.

const MOST = 60;
const LARGEST = 4 << 20; // bytes of a file that is kept after the page is closed

/** Keeps drawings, the newest first: `{id, fields, thumbnail, picture, image, mask, seconds}`. */
export class History {
  constructor() {
    this.entries = [];
    this.database = null;
  }

  /** Bring back what an earlier page kept. */
  async open() {
    try {
      this.database = await openDatabase();
      const kept = await done(this.#store("readonly").getAll());
      this.entries = kept.sort((a, b) => b.id - a.id);
    } catch {
      this.database = null; // private windows may refuse; memory is left
    }
  }

  add(entry) {
    this.entries.unshift(entry);
    this.#write((store) => store.put(withoutLargeFiles(entry)));
    for (const old of this.entries.slice(MOST)) this.remove(old);
  }

  remove(entry) {
    this.entries = this.entries.filter((each) => each !== entry);
    this.#write((store) => store.delete(entry.id));
  }

  clear() {
    this.entries = [];
    this.#write((store) => store.clear());
  }

  #store(mode) {
    return this.database.transaction("drawings", mode).objectStore("drawings");
  }

  #write(change) {
    if (!this.database) return;
    done(change(this.#store("readwrite"))).catch(() => {}); // a full disk: memory is left
  }
}

function openDatabase() {
  const request = indexedDB.open("fluxdeploy", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("drawings", { keyPath: "id" });
  return done(request);
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function withoutLargeFiles(entry) {
  const small = (value) => !(value instanceof Blob) || value.size <= LARGEST;
  return Object.fromEntries(Object.entries(entry).filter(([, value]) => small(value)));
}
