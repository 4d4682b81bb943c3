// A service worker that adds the two headers without which a browser gives a page no threads (SharedArrayBuffer): most
// static servers do not send them. It changes nothing else, and caches nothing.

self.oninstall = () => self.skipWaiting()
self.onactivate = (event) => event.waitUntil(self.clients.claim())
self.onfetch = (event) => {
  const {request} = event
  if (request.cache === "only-if-cached" && request.mode !== "same-origin") return          // which fetch() refuses
  event.respondWith((async () => {
    const response = await fetch(request)
    if (!response.status) return response                   // opaque: of another origin
    const headers = new Headers(response.headers)
    headers.set("Cross-Origin-Opener-Policy", "same-origin")
    headers.set("Cross-Origin-Embedder-Policy", "require-corp")
    const {status, statusText} = response
    return new Response([204, 304].includes(status) ? null : response.body, {status, statusText, headers})
  })())
}
