// The theme's search runs in a worker, which browsers refuse to pages that are opened as files. There it runs in an
// invisible frame instead, which has the part of a worker's interface that the search uses.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.append(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.loaded = new Promise((loaded, failed) => {
        const script = frame.contentDocument.createElement("script")
        Object.assign(script, { src: url, onload: loaded, onerror: failed })
        frame.contentDocument.head.append(script)
      })
    }
    postMessage(data) {
      this.loaded.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
