// Plays a page in a real, headless Chromium: node browse_page.mjs BROWSER WORK PAGE ACTIONS
// BROWSER: folder into which npm has installed puppeteer-core and @sparticuz/chromium. WORK: for the browser's
// profile, downloads and screenshots. ACTIONS: JSON such as [["type", "#reviewer", "Eva"], ["press", "a"], ["reopen"]].
// Prints as JSON: what each ["read", NAME, EXPRESSION] found, all requests, errors, and the files downloaded.
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [home, work, file, actions] = process.argv.slice(2);
const load = async (...parts) => (await import(pathToFileURL(path.join(home, "node_modules", ...parts)))).default;
const chromium = await load("@sparticuz/chromium/build/esm/index.js");
const puppeteer = await load("puppeteer-core/lib/esm/puppeteer/puppeteer-core.js");
const downloads = path.join(work, "downloads");
fs.mkdirSync(downloads, { recursive: true });
const found = {};
const requests = [];
const errors = [];
let browser, page;

async function open() {
  browser = await puppeteer.launch({
    executablePath: await chromium.executablePath(),
    args: ["--no-sandbox", "--disable-gpu"],
    headless: "shell",
    userDataDir: path.join(work, "profile"), // what the page keeps lies here
    defaultViewport: { width: 1200, height: 720 },
  });
  page = await browser.newPage();
  page.on("request", (request) => requests.push(request.url().slice(0, 80)));
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("dialog", (dialog) => { errors.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });
  const session = await browser.target().createCDPSession();
  await session.send("Browser.setDownloadBehavior", { behavior: "allow", downloadPath: downloads });
  await page.goto(pathToFileURL(file).href);
}

// Until pictures are decoded and drawn.
const settle = () => page.evaluate(() => new Promise((done) => setTimeout(() => requestAnimationFrame(done), 50)));

const act = {
  press: (key) => page.keyboard.press(key),
  type: (where, text) => page.type(where, text),
  click: (where) => page.click(where),
  wheel: async (x, y, delta) => {
    await page.mouse.move(x, y);
    await page.mouse.wheel({ deltaY: delta });
  },
  drag: async (x, y, dx, dy) => {
    await page.mouse.move(x, y);
    await page.mouse.down();
    await page.mouse.move(x + dx, y + dy, { steps: 4 });
    await page.mouse.up();
  },
  size: (width, height) => page.setViewport({ width, height }),
  hold: async (key, times) => {
    for (let i = 0; i < times; i++) await page.keyboard.down(key);
    await page.keyboard.up(key);
  },
  read: async (name, expression) => { found[name] = await page.evaluate(expression); },
  shot: async (name) => { await settle(); await page.screenshot({ path: path.join(work, name) }); },
  reopen: async () => { await browser.close(); await open(); },
  download: async (where) => {
    const before = fs.readdirSync(downloads).length;
    await page.click(where);
    for (let i = 0; i < 100 && fs.readdirSync(downloads).length === before; i++) await settle();
  },
};
await open();
for (const [what, ...details] of JSON.parse(actions)) {
  await act[what](...details);
  await settle();
}
await browser.close();
console.log(JSON.stringify({ found, requests, errors, downloads: fs.readdirSync(downloads) }));
