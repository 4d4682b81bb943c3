// The network, in a worker, so that the page stays responsive. The first message starts it; each further one asks for
// images. Each is answered by one, {error} where it fails.

import {imageNoise} from "./noise.js"

let ort, session, size, steps

// size: of an image; steps: the network's; webgpu: whether to run there; runtime, wasm, model: onnxruntime-web and the
// network. -> threads: how many it runs on, 0 by WebGPU.
async function start({webgpu, runtime, wasm, model, ...about}) {
  ({size, steps} = about)
  ort = await import(runtime)
  const threads = self.crossOriginIsolated ? navigator.hardwareConcurrency ?? 1 : 1
  Object.assign(ort.env.wasm, {wasmBinary: wasm, numThreads: threads})
  session = await ort.InferenceSession.create(model, {executionProviders: [webgpu ? "webgpu" : "wasm"]})
  await draw({images: [0], labels: [0], seed: 0, walk: 0})  // a first run fails here, or compiles
  return {threads: webgpu ? 0 : threads}
}

// images: numbers of the images, labels: their classes. -> pixels: one after the other, as ImageData has them.
async function draw({images, labels, seed, walk}) {
  const noise = (draws) => {                                // [images, draws, 3, size, size]
    const parts = images.flatMap((i) => draws.map((draw) => imageNoise(seed, i, size, draw, walk)))
    const all = new Float32Array(parts.length * parts[0].length)
    parts.forEach((part, i) => all.set(part, i * part.length))
    return all
  }
  const n = images.length, feeds = {
    z: new ort.Tensor("float32", noise([0]), [n, 3, size, size]),
    labels: new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [n]),
  }
  if (steps > 1) {
    const draws = Array.from({length: steps - 1}, (_, draw) => draw + 1)
    feeds.renoise = new ort.Tensor("float32", noise(draws), [n, steps - 1, 3, size, size])
  }
  const {data} = (await session.run(feeds, ["images"])).images                              // uint8 [n, size, size, 3]
  const pixels = new Uint8ClampedArray(data.length / 3 * 4).fill(255)
  for (let k = 0; k < data.length / 3; k++) pixels.set(data.subarray(3 * k, 3 * k + 3), 4 * k)
  return {pixels}
}

self.onmessage = async ({data}) => {
  try {
    self.postMessage(await (data.model ? start(data) : draw(data)))
  } catch (error) {
    self.postMessage({error: String(error?.message ?? error) || "unknown"})           // WebAssembly throws numbers, too
  }
}
