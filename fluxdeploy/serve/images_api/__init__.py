"""The images API of OpenAI over HTTP, with previews of the running picture, and a page to try it.

`app` has the routes, `bodies` what a request may say, `drawing` what is drawn of it, `replies` what
is answered.
"""
