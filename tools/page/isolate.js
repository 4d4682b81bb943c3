// A service worker that adds the two headers without which a browser gives a page no threads (SharedArrayBuffer): most
// static servers do not send them. It caches nothing. A browser keeps it for good, but another site may be served at
// this address later: once its page is gone, it removes itself.

self.oninstall = () => self.skipWaiting()
self.onactivate = (event) => event.waitUntil(self.clients.claim())
self.onfetch = (event) => {
  const {request} = event
  if (request.cache === "only-if-cached" && request.mode !== "same-origin") return          // which fetch() refuses
  event.respondWith((async () => {
    if (request.mode === "navigate" && !await served()) {
      await self.registration.unregister()
      return fetch(request)
    }
    const response = await fetch(request)
    if (!response.status) return response                   // opaque: of another origin
    const headers = new Headers(response.headers)
    headers.set("Cross-Origin-Opener-Policy", "same-origin")
    headers.set("Cross-Origin-Embedder-Policy", "require-corp")
    const {status, statusText} = response
    return new Response([204, 304].includes(status) ? null : response.body, {status, statusText, headers})
  })())
}

async function served() {                                   // -> whether this script is still there
  const {ok, headers} = await fetch(self.location, {cache: "no-store"})
  return ok && /script/.test(headers.get("Content-Type"))   // some sites answer every address with their page
}
